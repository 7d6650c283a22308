"""A file of lines that several processes append to and that may end in the middle of one.

May touch: that file. Must never: know what is in a line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")


class LineFile:
    """Opened at the first line. Not thread safe."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._fd = -1

    def append(self, line: bytes) -> None:
        """One `write` of one line with its newline. Raises OSError."""
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                line = b"\n" + line  # a writer died within its line: do not let it swallow ours
        if os.write(self._fd, line) != len(line):
            raise OSError(f"short write to {self._path}")

    def close(self) -> None:
        """Idempotent. A line after it opens the file again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


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
