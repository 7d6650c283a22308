"""The only place of the control plane that reads the time."""

from __future__ import annotations

import time


class SystemClock:
    """`ports.Clock` on the machine's own clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()
