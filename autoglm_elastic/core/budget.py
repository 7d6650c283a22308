"""The restart budget: how many failures without progress a job may have.

A job that makes progress is not charged for old failures. Progress is a committed step that is newer than any
seen at an earlier failure; for a job that never committed one (a script that knows nothing of us), it is a
group that stayed up for `progress_s`.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoglm_elastic.core.failure import Failure


@dataclass(frozen=True, slots=True)
class Budget:
    """`failures` since the last progress, `step` the newest committed step seen at a failure (-1: none),
    `first` the first failure since the last progress: the one to be named, since later ones are often its
    echo."""

    max_restarts: int
    progress_s: float
    failures: int = 0
    step: int = -1
    first: Failure | None = None

    def charge(
        self, failure_step: int, alive_s: float, failure: Failure | None = None
    ) -> tuple[Budget, bool]:
        """One more failure, of a group that had committed up to `failure_step` and had been up for `alive_s`
        seconds.

        Returns the new budget and whether a restart is still allowed.
        """
        step = max(self.step, failure_step)
        progressed = step > self.step if step >= 0 else alive_s >= self.progress_s
        if progressed or self.failures == 0:
            budget = Budget(self.max_restarts, self.progress_s, 1, step, failure)
        else:
            budget = Budget(self.max_restarts, self.progress_s, self.failures + 1, step, self.first)
        return budget, budget.failures <= self.max_restarts
