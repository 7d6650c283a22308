"""Signals of the agent, delivered to its event loop instead of raised wherever it happens to be.

torch's `PContext.start` installs handlers that raise `SignalException` in the main thread; that would cut
an event handler of ours in two. `take_over` puts ours in their place: they only note the signal, and the
loop wakes up.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections import deque
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a job to commit a snapshot and leave, where its workers can."""


class SignalInbox:
    """A context manager around the loop; `fileno()` is readable when a signal has arrived. Main thread
    only."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._received: deque[signal.Signals] = deque()
        self._previous = -1

    def __enter__(self) -> SignalInbox:
        self._previous = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *exc_info: object) -> None:
        signal.set_wakeup_fd(self._previous)
        self._read.close()
        self._write.close()

    def fileno(self) -> int:
        return self._read.fileno()

    def take_over(self, handled: str) -> None:
        """From now on the signals that torch handles (`handled`: its --signals-to-handle), and those that
        ask a job
        to leave, come here. One that is ignored (nohup) stays ignored."""
        names = {name.strip() for name in handled.split(",") if name.strip()} | {
            sig.name for sig in STOP_SIGNALS
        }
        for name in sorted(names):
            number = getattr(signal, name, None)
            if isinstance(number, signal.Signals) and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def take(self) -> list[signal.Signals]:
        """Signals since the last call, in order."""
        with contextlib.suppress(BlockingIOError):
            while self._read.recv(4096):
                pass
        received = list(self._received)
        self._received.clear()
        return received

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received.append(signal.Signals(number))
