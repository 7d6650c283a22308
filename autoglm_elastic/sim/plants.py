"""Planted bugs: what the simulator must be able to find. Each replaces one function of `core`, here and
nowhere else.

A simulator that never fails proves nothing; these are the mistakes that the protocols exist to prevent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from autoglm_elastic.core import membership, recovery, split
from autoglm_elastic.core.commit import (
    Announce,
    Coordinator,
    CoordinatorEffect,
    CoordinatorEvent,
    EntryPut,
    ManifestWritten,
    PutEntry,
    Verdict,
    WriteManifest,
)
from autoglm_elastic.core.lineage import EntryFact, GenerationRecord
from autoglm_elastic.core.membership import Broken, Effect, Event, Finished, LeaderState
from autoglm_elastic.core.outcome import Outcome
from autoglm_elastic.core.recovery import Holding, Plan
from autoglm_elastic.sim.core import Core


def _plan_without_fence(
    world_size: int,
    holdings: Iterable[Holding],
    entries: Iterable[EntryFact],
    records: Iterable[GenerationRecord],
    **rest: Any,
) -> Plan:
    """The newest of anything, whoever wrote it."""
    return recovery.plan(world_size, holdings, entries, (), **rest)


def _plan_mixing_steps(
    world_size: int,
    holdings: Iterable[Holding],
    entries: Iterable[EntryFact],
    records: Iterable[GenerationRecord],
    **rest: Any,
) -> Plan:
    """Whoever holds anything keeps it, one step apart or not."""
    holdings = tuple(holdings)
    plan = recovery.plan(world_size, holdings, entries, records, **rest)
    keeps = {holding.rank for holding in holdings if holding.complete and holding.step >= 0}
    return replace(plan, receivers=tuple(rank for rank in plan.receivers if rank not in keeps))


class _Hasty(Coordinator):
    """Half of the votes will do."""

    __slots__ = ()

    def _all_prepared(self, votes: tuple[tuple[int, bytes], ...]) -> bool:
        return 2 * len(votes) >= self.world_size


class _EntryFirst(Coordinator):
    """The entry before the manifest that it names."""

    __slots__ = ()

    def step(self, event: CoordinatorEvent) -> tuple[Coordinator, tuple[CoordinatorEffect, ...]]:
        machine, effects = super().step(event)
        written: list[CoordinatorEffect] = []
        for effect in effects:
            if isinstance(effect, WriteManifest):
                written.append(PutEntry(effect.snapshot))
            written.append(effect)
        return machine, tuple(written)


class _UnknownIsAbort(Coordinator):
    """What was not confirmed did not happen."""

    __slots__ = ()

    def step(self, event: CoordinatorEvent) -> tuple[Coordinator, tuple[CoordinatorEffect, ...]]:
        if (
            isinstance(event, EntryPut)
            and event.outcome is Outcome.UNKNOWN
            and event.snapshot == self.snapshot
        ):
            abort = Announce(event.snapshot, Verdict.ABORT, "the entry was not confirmed")
            return type(self)(self.generation, self.world_size), (abort,)
        return super().step(event)


class _ManifestUnconfirmed(Coordinator):
    """A manifest that was not confirmed to be durable is good enough."""

    __slots__ = ()

    def step(self, event: CoordinatorEvent) -> tuple[Coordinator, tuple[CoordinatorEffect, ...]]:
        if isinstance(event, ManifestWritten):
            event = replace(event, outcome=Outcome.OK)
        return super().step(event)


def _even_rounding_up(total: int, parts: int) -> list[tuple[int, int]]:
    """Every part as long as the longest: neighbours share samples when the world does not divide the
    batch."""
    size = -(-total // parts)
    return [(start, start + size) for start, _ in split.even(total, parts)]


def _lead_without_fence(state: LeaderState, event: Event) -> tuple[LeaderState, tuple[Effect, ...]]:
    """Old news are taken for news of the current generation."""
    if isinstance(event, Broken | Finished) and state.generation is not None:
        event = replace(event, generation=state.generation.number)
    return membership.step(state, event)


def _lead_charging_twice(state: LeaderState, event: Event) -> tuple[LeaderState, tuple[Effect, ...]]:
    """Every loss is a failure of its own, whatever broke before."""
    return membership.step(replace(state, unheard=frozenset()), event)


def _lead_without_waking(state: LeaderState, event: Event) -> tuple[LeaderState, tuple[Effect, ...]]:
    """Nobody is woken up: a wait without an end."""
    state, effects = membership.step(state, event)
    return state, tuple(effect for effect in effects if not isinstance(effect, membership.WakeAt))


@dataclass(frozen=True, slots=True)
class Plant:
    """`breaks`: the invariants that may show it first."""

    name: str
    what: str
    breaks: frozenset[str]
    make: Callable[[], Core]


def _plant(name: str, what: str, breaks: str, **replaced: Any) -> Plant:
    return Plant(name, what, frozenset(breaks.split()), lambda: replace(Core(), **replaced))


PLANTS: Final = {
    plant.name: plant
    for plant in (
        _plant("skipped-fence", "recovery ignores the lineage", "I2 I3", plan=_plan_without_fence),
        _plant("commit-before-votes", "half of the votes commit", "I1", coordinator=_Hasty),
        _plant("mixed-steps", "survivors keep their own step", "I2", plan=_plan_mixing_steps),
        _plant("entry-before-manifest", "the entry comes first", "I1", coordinator=_EntryFirst),
        _plant("manifest-unconfirmed", "an unknown manifest will do", "I1", coordinator=_ManifestUnconfirmed),
        _plant("unknown-is-abort", "an unknown entry is aborted", "I1 I5", coordinator=_UnknownIsAbort),
        _plant("sample-repeated", "ranks share samples", "I4", even=_even_rounding_up),
        _plant("stale-news", "the leader does not fence", "I6", lead=_lead_without_fence),
        _plant("charged-twice", "one incident, two failures", "I6", lead=_lead_charging_twice),
        _plant("no-deadline", "the leader never wakes up", "I8", lead=_lead_without_waking),
    )
}
"""By name, as `autoglm simulate --plant` takes it."""


def planted(name: str | None) -> Core:
    """Production's core, or one with the named bug in it. Raises ValueError for an unknown name."""
    if name is None:
        return Core()
    if name not in PLANTS:
        raise ValueError(f"no plant {name!r}; valid: {', '.join(sorted(PLANTS))}")
    return PLANTS[name].make()
