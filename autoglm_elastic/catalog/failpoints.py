"""Named points between every two effects of a snapshot, for tests that stop or kill a process exactly there.

Production passes nothing and each point is one call of a function that returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

POINTS: Final = (
    "staged",
    "pack_written",
    "packs_written",
    "vote_sent",
    "votes_gathered",
    "manifest_written",
    "entry_put",
    "announced",
    "hints_moved",
    "decided",
)
"""In the order in which they are passed: `vote_sent` not on rank 0, `votes_gathered` to `hints_moved` only
there, the others on every rank."""

Failpoints = Callable[[str], None]


def none(point: str) -> None:
    """Does nothing."""
