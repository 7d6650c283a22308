"""The signals that ask this process to stop: noted, and looked at by all ranks at the next step boundary.

May touch: the handlers of `SIGNALS_STOP` while the training function runs. Must never: stop anything itself,
other than a process that waits for a world, which has nobody to agree with.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

SIGNALS_STOP: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """`number`: the signal that came, 0 for none. The second one acts as if we did not exist."""

    def __init__(self) -> None:
        self.number = 0

    @contextmanager
    def handled(self, waiting: Callable[[], bool]) -> Iterator[None]:
        """While inside, the signals are noted, if this is the main thread: Python lets no other one set handlers.
        `waiting()`: there is no world to agree on a stop with."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, _frame: object) -> None:
            if self.number:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.number = number
            if waiting():
                raise SystemExit(128 + number)

        before = {number: signal.signal(number, on_signal) for number in SIGNALS_STOP}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
