"""A bad link: what netem does, for kernels without it. A thread carries frames between two interfaces."""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import threading
import time
from typing import Final

import pytest

_TUN: Final = "/dev/net/tun"
_TUNSETIFF: Final = 0x400454CA
_TAP_WITHOUT_HEADER: Final = 0x0002 | 0x1000
_FRAME_BYTES_MAX: Final = 1 << 16
_FRAMES_MAX: Final = 10_000
"""What is under way on a wire at once; more is lost, as in a switch."""
_JOIN_S_MAX: Final = 10.0


needs_wires = pytest.mark.skipif(not os.path.exists(_TUN), reason=f"no {_TUN} on this machine")


def tap(name: str) -> int:
    """A new interface in the network of the calling thread, gone when this descriptor is closed."""
    descriptor = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class Wire:
    """Carries frames both ways between two taps, which it owns; a context.

    `delay_s`: how long each frame takes. `reordered`, `lost`: shares of the frames, from 0 to 1, that go on without
    the delay, or not at all. All of them may be changed at any time.
    """

    def __init__(self, one: int, other: int) -> None:
        self.delay_s = self.reordered = self.lost = 0.0
        self.carried = self.dropped = 0
        self._ends = {one: other, other: one}
        self._dice = random.Random(1)
        self._number = itertools.count()
        self._under_way: list[tuple[float, int, int, bytes]] = []
        self._woken, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.write(self._wake, b"x")
        self._thread.join(_JOIN_S_MAX)
        assert not self._thread.is_alive(), "a wire does not end"
        for descriptor in (*self._ends, self._woken, self._wake):
            os.close(descriptor)

    def _run(self) -> None:
        while True:
            now = time.monotonic()
            while self._under_way and self._under_way[0][0] <= now:
                _, _, end, frame = heapq.heappop(self._under_way)
                with contextlib.suppress(OSError):  # the interface is down, or its queue is full: lost
                    os.write(end, frame)
            left = self._under_way[0][0] - now if self._under_way else None
            ready, _, _ = select.select([*self._ends, self._woken], [], [], left)
            if self._woken in ready:
                return
            for end in ready:
                self._take(end)

    def _take(self, end: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                frame = os.read(end, _FRAME_BYTES_MAX)
                if self._dice.random() < self.lost or len(self._under_way) >= _FRAMES_MAX:
                    self.dropped += 1
                    continue
                self.carried += 1
                delay_s = 0.0 if self._dice.random() < self.reordered else self.delay_s
                entry = (time.monotonic() + delay_s, next(self._number), self._ends[end], frame)
                heapq.heappush(self._under_way, entry)
