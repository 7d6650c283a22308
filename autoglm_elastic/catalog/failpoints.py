"""Named points between every two effects of a snapshot, for tests that stop or kill a process exactly there.

Production passes nothing and each point is one call of a function that returns.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Final

from autoglm_elastic.errors import UsageError

POINTS: Final = (
    "staged",
    "job_taken",
    "pack_written",
    "packs_written",
    "vote_sent",
    "votes_gathered",
    "prepared_put",
    "manifest_written",
    "entry_due",
    "entry_put",
    "announced",
    "hints_moved",
    "decided",
)
"""In the order in which they are passed: `vote_sent` not on rank 0, `votes_gathered` to `hints_moved` only there,
the others on every rank. In a keeper: `job_taken` and `pack_written`; `prepared_put` to `hints_moved` when it
finishes a snapshot without its ranks."""

ENV_FAILPOINT: Final = "AUTOGLM_TEST_FAILPOINT"
"""For a keeper, which no test can hand a function: `POINT:ACTION`, with an action of `_ACTIONS`."""

Failpoints = Callable[[str], None]


def none(point: str) -> None:
    """Does nothing."""


def _raise() -> None:
    raise RuntimeError("a bug, planted by a test")


_ACTIONS: Final[Mapping[str, Callable[[], None]]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": _raise,
}


def from_environment(environ: Mapping[str, str]) -> Failpoints:
    """What ENV_FAILPOINT asks for. Raises UsageError for what it does not know."""
    wanted = environ.get(ENV_FAILPOINT, "")
    if not wanted:
        return none
    point, _, action = wanted.partition(":")
    if point not in POINTS or action not in _ACTIONS:
        raise UsageError(f"{ENV_FAILPOINT}={wanted}", valid="a point and one of kill, stop, raise")

    def reached(here: str) -> None:
        if here == point:
            _ACTIONS[action]()

    return reached
