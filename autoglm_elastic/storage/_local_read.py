"""Reading an open file of the local file system, and its errors as a line for people."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from typing import Final

from autoglm_elastic.errors import CorruptSnapshot, PlatformError
from autoglm_elastic.storage.files import Files

READ_BYTES: Final = 512 << 10
"""One read call; fits into the processor's cache, where it is hashed next."""


def platform_error(error: OSError, doing: str, path: str) -> PlatformError:
    """An OSError as one line for a person."""
    advice = {
        errno.ENOSPC: "free some space or choose another run directory",
        errno.EDQUOT: "free some of your quota or choose another run directory",
        errno.EROFS: "choose a run directory on a writable file system",
        errno.EACCES: "check the permissions of the run directory",
        errno.EPERM: "check that the file system allows this operation (hard links are needed)",
        errno.EIO: "check the disk",
    }.get(error.errno or 0, "")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return PlatformError(f"{doing} {path}: {reason}", do=advice)


def _behind(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of the buffers when `count` bytes are in."""
    for number, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[number + 1 :]]
        count -= view.nbytes
    return []


class LocalReader:
    """One open file (ports.BlobReader); reads carry their own offset, so threads can share it."""

    def __init__(self, files: Files, fd: int, name: str, path: str, nbytes: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self._files, self._fd, self._path = files, fd, path

    block = READ_BYTES

    def read_into(self, offset: int, view: memoryview) -> None:
        self.scatter_into(offset, [view])

    def scatter_into(self, offset: int, views: Sequence[memoryview]) -> None:
        nbytes = sum(view.nbytes for view in views)
        if offset < 0 or offset + nbytes > self.nbytes:
            raise CorruptSnapshot(
                f"{self._path} has {self.nbytes} bytes, but {nbytes} from {offset} are wanted"
            )
        left = list(views)
        while nbytes:
            try:
                count = self._files.read_into(self._fd, left, offset)
            except OSError as error:
                raise platform_error(error, "reading", self._path) from error
            if count == 0:
                raise CorruptSnapshot(f"{self._path} became shorter while it was read")
            offset, nbytes = offset + count, nbytes - count
            left = _behind(left, count) if nbytes else []

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # nothing was written
                self._files.close(fd)
