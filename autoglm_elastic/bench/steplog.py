"""What the trainings report, line by line, through a FIFO.

A FIFO and not a file: the driver is woken by every line, and a write of less than PIPE_BUF bytes is whole or
absent even when its writer is killed.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

READ_BYTES: Final = 65536


@dataclass(frozen=True, slots=True)
class Line:
    """`life`: the restart (torchrun's script) or generation (the elastic one) that the line belongs to."""

    wall_ns: int
    what: str
    rank: int
    step: int
    life: int
    pid: int

    @classmethod
    def parse(cls, text: str) -> Line:
        wall_ns, what, rank, step, life, pid = text.split()
        return cls(int(wall_ns), what, int(rank), int(step), int(life), int(pid))


class StepLog:
    """The driver's end of the FIFO at `path`, which it makes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._rest = b""
        self._whole: deque[bytes] = deque()

    def line(self, deadline: float, also: int) -> Line | None:
        """The next line, or None when it is past `deadline` (monotonic seconds) or the pidfd `also` is
        readable."""
        while not self._whole:
            ready, _, _ = select.select([self._fd, also], [], [], max(0.0, deadline - time.monotonic()))
            if self._fd not in ready:
                return None
            *whole, self._rest = (self._rest + os.read(self._fd, READ_BYTES)).split(b"\n")
            self._whole.extend(whole)
        return Line.parse(self._whole.popleft().decode())

    def close(self) -> None:
        os.close(self._fd)
        self.path.unlink()
