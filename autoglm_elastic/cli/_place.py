"""From the RUN that a person gave to the blobs under it, with one clear line for what is no run directory.

May touch: names in the directory and its run.json. Must never: create anything, except the lock of `claimed`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.errors import UsageError
from autoglm_elastic.ports import StreamBlobs
from autoglm_elastic.storage import LocalBlobs, is_url, open_blobs

_MARKS: Final = (
    "run.json",
    "events.jsonl",
    fmt.CATALOG_DIR,
    fmt.GENERATION_DIR,
    fmt.MANIFEST_DIR,
    fmt.PACK_DIR,
)
"""A directory that is not empty and has none of these is somebody else's."""


def opened(run: str) -> StreamBlobs:
    """Raises UsageError for what is no run directory, or one of a newer format."""
    from autoglm_elastic.agent.run_dir import check_format

    if is_url(run):
        from autoglm_elastic.agent.snapshot_place import read_info

        blobs = open_blobs(run)
        read_info(blobs, run)
        return blobs
    path = Path(run)
    if not path.is_dir():
        raise UsageError(f"no run directory {run}", valid="what was given as autoglm-run --run-dir")
    try:
        names = os.listdir(path)
    except OSError as error:
        raise UsageError(f"run directory {run}: {error.strerror}") from error
    if names and not set(names) & set(_MARKS):
        raise UsageError(
            f"{run} is no run directory", valid="a directory that autoglm-run or CheckpointManager wrote"
        )
    check_format(path)
    return LocalBlobs(path)


def made(run: str) -> StreamBlobs:
    """As `opened`, for who may begin a run directory: one that is not there yet is made with the first blob."""
    return opened(run) if is_url(run) or Path(run).exists() else LocalBlobs(run)


@contextlib.contextmanager
def claimed(run: str, *, force: bool) -> Iterator[None]:
    """Nobody starts a job here meanwhile, and none runs now. Raises UsageError naming who does."""
    from autoglm_elastic.agent.run_dir import RunDirectory

    if is_url(run):
        if not force:
            raise UsageError(f"{run} has no lock", do="make sure that no job runs there; --force")
        yield
        return
    directory = RunDirectory(run, run_id=None)
    try:
        directory.lock()
    except UsageError as error:
        if not force:
            raise UsageError(
                error.got, do="stop the job first; --force if that is no job of this directory"
            ) from None
    try:
        yield
    finally:
        directory.unlock()


def event_log(run: str) -> Path | None:
    """Where what was done here is noted, or None where no log can be appended to."""
    from autoglm_elastic.observe.events import EVENTS_NAME

    return None if is_url(run) else Path(run) / EVENTS_NAME
