"""A node that has lost its lease comes back as a new member: when it tries, how often, and for how long.

Pure bookkeeping with the time handed in; the supervisor has called the workers off before and makes the attempts.
"""

from __future__ import annotations

from typing import Final

from autoglm_elastic.errors import PlatformError

PAUSE_S_MIN: Final = 0.25
PAUSE_S_MAX: Final = 2.0
"""Between attempts, doubling; one that hangs in the store has the store's own time limit. That the connection is
back is told at once."""

REJOINS_MAX: Final = 8
"""Leases lost without a newer committed step in between: such a node costs the others a recovery each time and adds
nothing."""


class Rejoin:
    """`due`: when to try next (monotonic seconds), None while the node is a member."""

    def __init__(self, limit_s: float) -> None:
        self.due: float | None = None
        self._limit_s = limit_s
        self._give_up_at = 0.0
        self._pause_s = PAUSE_S_MIN
        self._reason = ""
        self._step = -1
        self._losses = 0

    def lost(self, reason: str, step: int, now: float) -> None:
        """The lease is gone and no worker trains; `step`: the newest that this node has committed.

        Raises:
            PlatformError: it was lost too often.
        """
        self._losses = 1 if step > self._step else self._losses + 1
        self._step = max(self._step, step)
        self._reason = reason
        if self._losses > REJOINS_MAX:
            raise self.error(f"{self._losses} times without a new step in between", reason)
        self._give_up_at = now + self._limit_s
        self._pause_s = PAUSE_S_MIN
        self.due = now

    def nudge(self, now: float) -> None:
        """The store is back: try now."""
        if self.due is not None:
            self.due = min(self.due, now)

    def failed(self, error: Exception, now: float) -> None:
        """An attempt was in vain.

        Raises:
            PlatformError: that was the last one.
        """
        if now >= self._give_up_at:
            raise self.error(f"and could not rejoin for {self._limit_s:g} s ({error})", self._reason)
        self.due = min(now + self._pause_s, self._give_up_at)
        self._pause_s = min(2 * self._pause_s, PAUSE_S_MAX)

    def done(self) -> None:
        self.due = None

    @staticmethod
    def error(how: str, reason: str) -> PlatformError:
        """For the person: this node does not come back by itself."""
        return PlatformError(
            f"this node lost its membership {how}: {reason}",
            do="start the same command again: it rejoins the job, or resumes it from the run directory",
        )
