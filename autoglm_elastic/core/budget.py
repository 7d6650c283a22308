"""The restart budget: how many failures without progress a job may have.

A job that makes progress is not charged for old failures. Progress is a committed step that is newer than any
seen at an earlier failure; for a job that never committed one (a script that knows nothing of us), it is a
group that stayed up for `progress_s`. A job that commits steps has a budget of its own: `max_restarts` speaks of
restarts of a whole group, which such a job hardly has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoglm_elastic.core.failure import Failure


@dataclass(frozen=True, slots=True)
class Budget:
    """`max_failures`: for a job that has committed a step, when it is more than `max_restarts`. `failures`
    since the last progress, `step` the newest committed step seen at a failure (-1: none), `first` the first
    failure since the last progress: the one to be named, since later ones are often its echo."""

    max_restarts: int
    progress_s: float
    max_failures: int = 0
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
            budget = replace(self, failures=1, step=step, first=failure)
        else:
            budget = replace(self, failures=self.failures + 1, step=step)
        return budget, budget.failures <= budget.allowed

    @property
    def allowed(self) -> int:
        """Failures without progress that a restart still follows."""
        return self.max_restarts if self.step < 0 else max(self.max_restarts, self.max_failures)
