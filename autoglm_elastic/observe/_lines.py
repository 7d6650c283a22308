"""A file of lines that several processes append to, that may end in the middle of one, on a disk that may be full.

May touch: that file. Must never: know what is in a line.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import msgspec

T = TypeVar("T")


BACKLOG_LINES_MAX: Final = 1000
"""Lines kept while the disk is full or read-only; of more, the oldest are lost."""


class LineFile:
    """Opened at the first line. Not thread safe.

    A line that cannot be written is kept, and written before the next one that can.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._fd = -1
        self._torn = False
        self._backlog: deque[bytes] = deque(maxlen=BACKLOG_LINES_MAX)

    def append(self, line: bytes) -> None:
        """One `write` of one line with its newline. Raises OSError when it has to wait for a later one."""
        self._backlog.append(line)
        self._write_backlog()

    def close(self) -> None:
        """Idempotent. A line after it opens the file again."""
        if self._backlog:
            with contextlib.suppress(OSError):
                self._write_backlog()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write_backlog(self) -> None:
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            size = os.fstat(self._fd).st_size
            self._torn = bool(size) and os.pread(self._fd, 1, size - 1) != b"\n"
        while self._backlog:
            line = self._backlog[0]
            if self._torn:
                line = b"\n" + line  # a line ends in its middle: do not let it swallow ours
            written = os.write(self._fd, line)
            self._torn = written != len(line)
            if self._torn:
                raise OSError(errno.ENOSPC, f"short write to {self._path}")
            self._backlog.popleft()


def parse(line: bytes, decoder: msgspec.json.Decoder[T]) -> T | None:
    """What one line holds, or None when it is torn or not one of ours."""
    try:
        return decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def read(path: str | os.PathLike[str], parse_line: Callable[[bytes], T | None]) -> Iterator[T]:
    """What the lines hold, in order. Torn lines and a file that is not there yet are passed over."""
    try:
        file = open(path, "rb")  # noqa: SIM115  (a missing file is an answer, not an error)
    except FileNotFoundError:
        return
    with file:
        for line in file:
            found = parse_line(line)
            if found is not None:
                yield found
