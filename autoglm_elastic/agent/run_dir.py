"""The run directory as the launcher sees it: whose it is, who uses it, what starting afresh would destroy.

May touch: `run.json` and `.lock` of the run directory and, on a confirmed `--fresh`, what our own rooms wrote
there. Must never: change anything before every check has passed, delete a file that is not one of ours, or
delete without holding the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from autoglm_elastic.core.lineage import EntryFact, parse_entry_name
from autoglm_elastic.errors import UsageError, in_one_line
from autoglm_elastic.observe import presence

FORMAT_VERSION: Final = 1
"""Of the run directory as a whole. A directory of a newer version is refused, not guessed at."""

RUN_NAME: Final = "run.json"
LOCK_NAME: Final = ".lock"
_RUN_BYTES_MAX: Final = 64 * 1024

_OURS: Final = (
    "HEAD",
    "latest",
    "catalog",
    "manifests",
    "prepared",
    "generations",
    "retired",
    "tags",
    "packs",
    "logs",
    presence.FOLDER,
    "metrics.jsonl",
    "events.jsonl",
    RUN_NAME,
)
"""What a run writes, in the order in which it is destroyed: first what makes a snapshot visible."""

_AFTER_RUN_JSON: Final = ("logs", "metrics.jsonl", "events.jsonl")
"""What a run writes only once `run.json` is there, under names that others give their files too."""


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`run.json`. Unknown fields are ignored: a later version of the same format may add some."""

    run_id: str
    format_version: int
    created: str
    command: list[str] = []


def new_info(run_id: str, command: list[str]) -> bytes:
    """A `run.json`, written now."""
    info = RunInfo(
        run_id=run_id,
        format_version=FORMAT_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
    )
    return msgspec.json.format(msgspec.json.encode(info), indent=2) + b"\n"


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a run directory holds. `newest_step` is -1 without snapshots; `nbytes`: of all files of ours."""

    snapshots: int
    newest_step: int
    nbytes: int

    def __str__(self) -> str:
        if not self.snapshots:
            return f"no snapshots, {_size(self.nbytes)}"
        plural = "" if self.snapshots == 1 else "s"
        return f"{self.snapshots} snapshot{plural}, newest of step {self.newest_step}, {_size(self.nbytes)}"


class RunDirectory:
    """One run directory, checked when it is made and untouched until `begin`.

    Args:
        path: may not exist yet.
        run_id: the job's name when the user gave one; None takes the directory's own, or a new one.

    Raises:
        UsageError: another job's directory, a newer format, a damaged run.json, files of somebody else under
            our names, or not writable.
    """

    def __init__(self, path: str | os.PathLike[str], *, run_id: str | None) -> None:
        self.path = Path(path).absolute()
        self._lock_fd = -1
        self._run_id_given = run_id
        info = _read_info(self.path)
        if info is not None:
            self._check(info, run_id)
        else:
            self._check_free()
        self.run_id = info.run_id if info is not None else run_id or str(uuid.uuid4())
        self._check_writable()

    def take_id(self, run_id: str, place: str) -> None:
        """Be of the run whose snapshots lie in `place`. Before `begin`. Raises UsageError when the directory is
        another's, or the user gave another name."""
        if run_id != self.run_id and (self._run_id_given is not None or _read_info(self.path) is not None):
            raise UsageError(
                f"the snapshots in {place} belong to run {run_id}, not {self.run_id}",
                do="give another snapshot.url, or a new --run-dir (and no --rdzv-id) to go on with that run",
            )
        self.run_id = run_id

    def begin(self, command: list[str]) -> None:
        """Create what is missing: the directory and its `run.json`. Several agents may do so at once."""
        with self._refusing_os_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            self._put_if_absent(new_info(self.run_id, command))
        written = _read_info(self.path)
        if written is None:
            raise UsageError(f"run directory {self.path}: {RUN_NAME} vanished while the job began")
        self._check(written, self._run_id_given)
        self.run_id = written.run_id  # another agent's, where that was first and nobody gave a name

    def lock(self) -> None:
        """Claim the directory for the agent that hosts the job's store. The lock ends with this process.

        Raises:
            UsageError: another launcher holds it; names the holder.
        """
        if self._lock_fd >= 0:
            return
        with self._refusing_os_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 256, 0).decode(errors="replace").strip() or "another launcher"
            os.close(fd)
            raise UsageError(
                f"run directory {self.path} is in use by {holder}",
                do="wait for it, stop it, or give another --run-dir",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._lock_fd = fd

    def unlock(self) -> None:
        """Give the directory back. Idempotent."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def holdings(self) -> Holdings:
        """What the directory holds now."""
        entries = self._entries()
        newest = max((entry.step for entry in entries), default=-1)
        return Holdings(len(entries), newest, sum(_nbytes(self.path / name) for name in _OURS))

    def is_empty(self) -> bool:
        """True when it holds nothing that a run wrote."""
        return not any(os.path.lexists(self.path / name) for name in _OURS)

    def destroy(self, snapshots_confirmed: int | None) -> None:
        """Delete what earlier runs wrote here, so that the next one begins from nothing. Needs the lock.

        Args:
            snapshots_confirmed: the number of snapshots that the user agreed to lose.

        Raises:
            UsageError: not confirmed, or another number than there are; says what would be destroyed.
        """
        if self._lock_fd < 0:
            raise RuntimeError("destroy() without the lock")
        if self.is_empty():
            return
        holdings = self.holdings()
        if snapshots_confirmed != holdings.snapshots:
            raise UsageError(
                f"--fresh would destroy run {self.run_id} in {self.path}: {holdings}",
                do=f"add --destroy={holdings.snapshots} to agree, or give another --run-dir",
            )
        with self._refusing_os_errors():
            for name in _OURS:
                _delete(self.path / name)

    def next_generation(self) -> int:
        """The first generation number that nothing in this directory has used."""
        used = [entry.generation for entry in self._entries()]
        for name in _names(self.path / "generations"):
            number = name.removesuffix(".json")
            if number.isascii() and number.isdigit():
                used.append(int(number))
        return max(used, default=0) + 1

    def _entries(self) -> list[EntryFact]:
        entries = []
        for name in _names(self.path / "catalog"):
            with contextlib.suppress(ValueError):  # not a snapshot's name: not ours to count
                entries.append(parse_entry_name(name))
        return entries

    def _check(self, info: RunInfo, run_id: str | None) -> None:
        _check_format(self.path, info)
        if run_id is not None and info.run_id != run_id:
            raise UsageError(
                f"run directory {self.path} belongs to run {info.run_id}, not {run_id}",
                do="give another --run-dir, or leave --rdzv-id out to go on with that run",
            )

    def _check_free(self) -> None:
        """Without a `run.json` these are somebody else's: not to be written to, nor taken by `--fresh`."""
        foreign = [name for name in _AFTER_RUN_JSON if os.path.lexists(self.path / name)]
        if foreign:
            raise UsageError(
                f"run directory {self.path} has no {RUN_NAME}, so its {' and '.join(foreign)} are not ours",
                do="give another --run-dir, or move them away",
            )

    def _check_writable(self) -> None:
        existing = self.path
        while not os.path.lexists(existing) and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise UsageError(f"run directory {self.path}: {existing} is not a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UsageError(f"run directory {self.path}: cannot write to {existing}")

    def _put_if_absent(self, data: bytes) -> None:
        fd, temporary = tempfile.mkstemp(dir=self.path, prefix=".run-")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(temporary, self.path / RUN_NAME)
        finally:
            os.unlink(temporary)
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _refusing_os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(f"run directory {self.path}: {error.strerror}") from error


def check_format(path: str | os.PathLike[str]) -> None:
    """For who only reads the directory. Raises UsageError for a newer format or a damaged run.json."""
    info = _read_info(Path(path))
    if info is not None:
        _check_format(Path(path), info)


def _check_format(path: Path, info: RunInfo) -> None:
    if info.format_version > FORMAT_VERSION:
        raise UsageError(
            f"run directory {path} has format version {info.format_version}",
            valid=f"up to {FORMAT_VERSION}",
            do="use the newer autoglm-elastic that wrote it, or another --run-dir",
        )


def parse_info(data: bytes) -> RunInfo:
    """Raises ValueError for what is no `run.json`."""
    try:
        return msgspec.json.decode(data, type=RunInfo)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(in_one_line(error)) from error


def _read_info(run_dir: Path) -> RunInfo | None:
    path = run_dir / RUN_NAME
    try:
        with path.open("rb") as file:
            data = file.read(_RUN_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"run directory {run_dir}: {error.strerror}") from error
    try:
        if len(data) > _RUN_BYTES_MAX:
            raise ValueError(f"larger than {_RUN_BYTES_MAX} bytes")
        return parse_info(data)
    except ValueError as error:
        raise UsageError(
            f"{path} is damaged: {error}", do="restore the file, or give another --run-dir"
        ) from error


def _names(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.endswith(".json") and not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _nbytes(path: Path) -> int:
    if path.is_symlink() or not path.exists():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(
        entry.stat().st_size for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink()
    )


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
