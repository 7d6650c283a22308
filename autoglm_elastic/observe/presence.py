"""Which agents are on a run right now: one small file each under `.agents/`, locked for as long as its agent lives.

The log cannot say that a job was cut off (SIGKILL, power): nobody was left to write it. A lock can, because the
kernel gives it up with its holder. May touch: `.agents/` of the run directory, to be written by agents only. Must
never: stop a job because a file could not be written or locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

FOLDER: Final = ".agents"
AGENTS_MAX: Final = 4096
"""Files looked at; a run has one an agent, and those of dead agents are swept when the next one starts."""
_BYTES_MAX: Final = 4096

logger = logging.getLogger(__name__)


class _Card(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent writes about itself. `boot`: of its kernel."""

    node: str
    host: str
    boot: str
    pid: int


class Agent(msgspec.Struct, frozen=True, kw_only=True):
    """One agent. `alive` is None when that cannot be known from this machine: it runs on another one, and its lock is
    not seen here."""

    node: str
    host: str
    pid: int
    alive: bool | None


@contextlib.contextmanager
def declared(run_dir: str | os.PathLike[str], node: str) -> Iterator[None]:
    """While inside, `read` finds this process as the agent of `node`. What cannot be written is logged, no more."""
    folder = Path(run_dir) / FOLDER
    path = folder / f"{hashlib.sha256(node.encode()).hexdigest()[:16]}.json"
    fd = -1
    try:
        folder.mkdir(exist_ok=True)
        _sweep(folder)
        fd = _put(folder, path, node)
    except OSError as error:
        logger.warning("no word in %s that this agent lives: %s", folder, error.strerror)
    try:
        yield
    finally:
        if fd >= 0:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(fd)


def read(run_dir: str | os.PathLike[str]) -> list[Agent]:
    """The agents that are, or were when they died, on this run; by node."""
    agents = []
    for path in _files(Path(run_dir) / FOLDER):
        try:
            with path.open("rb") as file:
                card = msgspec.json.decode(file.read(_BYTES_MAX), type=_Card)
                agents.append(
                    Agent(node=card.node, host=card.host, pid=card.pid, alive=_alive(file.fileno(), card))
                )
        except (OSError, msgspec.DecodeError):
            continue  # gone meanwhile, or never one of ours
    return sorted(agents, key=lambda agent: agent.node)


def _put(folder: Path, path: Path, node: str) -> int:
    """The file, locked before anybody can see it; its descriptor."""
    fd, temporary = tempfile.mkstemp(dir=folder, prefix=".new-")
    try:
        os.fchmod(fd, 0o644)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        card = _Card(node=node, host=socket.gethostname(), boot=_boot(), pid=os.getpid())
        os.write(fd, msgspec.json.encode(card))
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        os.close(fd)
        raise
    return fd


def _alive(fd: int, card: _Card) -> bool | None:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    fcntl.flock(fd, fcntl.LOCK_UN)
    # A lock that was taken on another machine may not be seen here.
    return False if card.boot == _boot() or card.host == socket.gethostname() else None


def _sweep(folder: Path) -> None:
    """Remove what dead agents of this machine left."""
    for path in _files(folder):
        with contextlib.suppress(OSError, msgspec.DecodeError), path.open("rb") as file:
            if _alive(file.fileno(), msgspec.json.decode(file.read(_BYTES_MAX), type=_Card)) is False:
                path.unlink()


def _files(folder: Path) -> list[Path]:
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
    except OSError:
        return []
    return [folder / name for name in names[:AGENTS_MAX]]


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def alive(agents: Iterable[Agent]) -> bool | None:
    """Whether one of them is; None when those that may be are on other machines."""
    seen = {agent.alive for agent in agents}
    if True in seen:
        return True
    return None if None in seen else False
