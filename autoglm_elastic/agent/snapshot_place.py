"""Where a job's snapshots lie when that is not its run directory (`snapshot.url`), as the launcher sees it.

May touch: `run.json` there, put if absent. Must never: change or delete anything else, or start a thread."""

from __future__ import annotations

from typing import Final

from autoglm_elastic.agent.run_dir import (
    FORMAT_VERSION,
    RUN_NAME,
    RunDirectory,
    RunInfo,
    new_info,
    parse_info,
)
from autoglm_elastic.catalog import generations
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.errors import PlatformError, UsageError
from autoglm_elastic.ports import Outcome, StreamBlobs
from autoglm_elastic.storage import open_blobs

_RUN_BYTES_MAX: Final = 64 * 1024


class SnapshotPlace:
    """The snapshots under `url`. Raises UsageError for a URL that is wrong; asks nobody yet."""

    def __init__(self, url: str) -> None:
        if url.startswith("memory:"):
            raise UsageError(
                f"snapshot.url {url}: that is the memory of one process", valid="s3://bucket/prefix"
            )
        self.url = url
        self._blobs: StreamBlobs = open_blobs(url)

    def claim(self, run_dir: RunDirectory, command: list[str]) -> None:
        """The place and the run directory are of one run from now on: a new directory takes the id that is
        there, a new place the directory's.

        Raises:
            UsageError: the snapshots there belong to another run, or are of a newer format.
            PlatformError: the place cannot be written with put-if-absent.
        """
        self._blobs = open_blobs(self.url, for_writing=True)
        outcome = self._blobs.put_if_absent(RUN_NAME, new_info(run_dir.run_id, command))
        if outcome is Outcome.UNKNOWN:
            raise PlatformError(f"{self.url}: no answer to the first write", do="check the network")
        info = read_info(self._blobs, self.url)
        if info is None:
            raise UsageError(f"{self.url}: {RUN_NAME} vanished while the job began")
        run_dir.take_id(info.run_id, self.url)

    def next_generation(self) -> int:
        """The first generation number that nothing there has used."""
        return generations.next_number(Catalog(self._blobs))


def read_info(blobs: StreamBlobs, url: str) -> RunInfo | None:
    """Whose snapshots these are; None where nobody wrote it down. Raises UsageError for a newer format."""
    try:
        data = blobs.read(RUN_NAME, bytes_max=_RUN_BYTES_MAX)
    except FileNotFoundError:
        return None
    try:
        info = parse_info(data)
    except ValueError as error:
        raise UsageError(
            f"{url}/{RUN_NAME} is damaged: {error}", do="restore it, or give another snapshot.url"
        ) from error
    if info.format_version > FORMAT_VERSION:
        raise UsageError(
            f"{url} has format version {info.format_version}",
            valid=f"up to {FORMAT_VERSION}",
            do="use the newer autoglm-elastic that wrote it",
        )
    return info
