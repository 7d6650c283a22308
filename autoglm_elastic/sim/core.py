"""The functions of `core` that a simulation runs: one place, so that a planted bug can replace one of
them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autoglm_elastic.core import membership, recovery, split
from autoglm_elastic.core.commit import Coordinator, Participant
from autoglm_elastic.core.membership import Effect, Event, LeaderState
from autoglm_elastic.core.split import Cursor


@dataclass(frozen=True, slots=True)
class Core:
    """Production's own functions by default."""

    lead: Callable[[LeaderState, Event], tuple[LeaderState, tuple[Effect, ...]]] = membership.step
    plan: Callable[..., recovery.Plan] = recovery.plan
    coordinator: type[Coordinator] = Coordinator
    participant: type[Participant] = Participant
    even: Callable[[int, int], list[tuple[int, int]]] = split.even
    advance: Callable[[Cursor, int, int, bool], Cursor] = split.advance
