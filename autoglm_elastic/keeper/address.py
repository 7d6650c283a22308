"""Where a node's keeper of a run directory listens, and how exactly one comes to listen there.

A directory that only the user can enter; a name made of the run directory, the node and our version: another
job's keeper, or one of another version, has another name and is not talked to. A short lock is held while a
keeper begins or ends to listen, never while it lives."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from autoglm_elastic.catalog.limits import FORMAT_VERSION
from autoglm_elastic.errors import PlatformError
from autoglm_elastic.keeper.messages import PROTOCOL

_PATH_BYTES_MAX: Final = 107
"""Of a unix socket's name."""
_CREDENTIALS: Final = struct.Struct("3i")
_LOCK_ATTEMPTS: Final = 10
"""Each is lost only to a keeper that ended at that moment."""


def our_version() -> str:
    """Keepers and clients talk only if this is the same for both."""
    try:
        package = version("autoglm-elastic")
    except PackageNotFoundError:
        package = "unknown"
    return f"{package}/{PROTOCOL}/{FORMAT_VERSION}"


def canonical(url: str) -> str:
    """A run directory's one name: URLs as they are, paths without links."""
    return url if "://" in url else os.path.realpath(url)


def socket_path(url: str, node: str, *, version_: str = "") -> str:
    """Raises PlatformError when no directory for it can be had."""
    run = hashlib.sha256(f"{canonical(url)}\0{node}".encode()).hexdigest()[:16]
    ours = hashlib.sha256((version_ or our_version()).encode()).hexdigest()[:8]
    path = os.path.join(_directory(), f"{run}-{ours}.sock")
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise PlatformError(f"socket {path} has too long a name", do="set XDG_RUNTIME_DIR to a shorter path")
    return path


def of_other_versions(path: str) -> list[str]:
    """Sockets of keepers of the same run directory and node that we do not talk to."""
    folder, name = os.path.split(path)
    run = name.partition("-")[0]
    with contextlib.suppress(OSError):
        return sorted(
            other
            for other in os.listdir(folder)
            if other.startswith(run) and other.endswith(".sock") and other != name
        )
    return []


def _directory() -> str:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    base = runtime if os.path.isdir(runtime) else tempfile.gettempdir()
    path = os.path.join(base, f"autoglm-{os.getuid()}")
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        status = os.lstat(path)
    except OSError as error:
        raise PlatformError(f"directory {path}: {error.strerror}", do="set XDG_RUNTIME_DIR") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PlatformError(f"{path} is not a directory that only you can enter", do=f"remove {path}")
    return path


def peer_of(connection: socket.socket) -> int:
    """The other side's process id. Raises PlatformError when it is another user's."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    if uid not in (os.getuid(), 0):
        raise PlatformError(f"process {pid} of user {uid} at the other end", valid=f"user {os.getuid()}")
    return int(pid)


@contextlib.contextmanager
def locked(path: str, *, wait: bool) -> Iterator[bool]:
    """Holds the lock of a socket's name; yields False when it is taken and `wait` is not. Waiting is bounded by
    what its holders do: a few system calls."""
    name = f"{path}.lock"
    for _ in range(_LOCK_ATTEMPTS):
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if _same_file(fd, name):
                yield True
                return
        finally:
            os.close(fd)
    yield False


def _same_file(fd: int, name: str) -> bool:
    """The one who held the lock before may have removed the file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(name, follow_symlinks=False))
    return False


def listen(path: str) -> socket.socket | None:
    """A listening socket of that name, or None when somebody listens there already. The lock is held."""
    if is_served(path):
        return None
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(128)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def is_served(path: str) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # its queue is full: somebody is there
            return True
        except OSError:
            return False
        return True


def vanish(path: str) -> None:
    """Removes the socket's and the lock's names. The lock is held."""
    for name in (path, f"{path}.lock"):
        with contextlib.suppress(OSError):
            os.unlink(name)
