"""The leader: turns who is alive and what broke into sealed generations.

Any agent can lead; the one that does feeds this machine and carries out its effects. Its duties, in order:

1. `start`; if a sealed generation is found in the store, `Adopted` first; then `MemberUp` for every live
member, then
   what was reported since (`Broken`, `Finished`) and, from then on, every change.
2. `Seal`: one transaction (the generation key unchanged since it was read, and still the leader). On
CONFLICT, or when
   an unknown outcome turns out to be one, drop this state and begin at 1: somebody else leads, or led
   meanwhile.
3. `WakeAt(time)`: feed `Tick` then (or later). A newer `WakeAt` replaces an older one.
4. After `FailJob` or `FinishJob` nothing more comes.

Events may be duplicated or late: what names another generation than the current one, or an older incarnation,
is ignored. One generation is charged to the restart budget once, however many of its workers die.

A planned generation is entered at a boundary; until then the one it grew from runs on, and may end there:
news of it still counts (`Generation.nodes_of`). For an agent that means: workers that end well in a
generation that the newest one grew from are reported `Finished` in *that* generation; in any other older one
they came too late, and the newest one needs new workers in their place.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoglm_elastic.core.budget import Budget
from autoglm_elastic.core.failure import Failure, node_left
from autoglm_elastic.core.generation import Generation, Member, Placement, place
from autoglm_elastic.core.news import (
    Adopted,
    Broken,
    Effect,
    Event,
    FailJob,
    Finished,
    FinishJob,
    MemberDown,
    MemberUp,
    Policy,
    Seal,
    Tick,
    WakeAt,
)

__all__ = [
    "Adopted",
    "Broken",
    "Effect",
    "Event",
    "FailJob",
    "Failure",
    "FinishJob",
    "Finished",
    "Generation",
    "LeaderState",
    "Member",
    "MemberDown",
    "MemberUp",
    "Phase",
    "Placement",
    "Policy",
    "Seal",
    "Tick",
    "WakeAt",
    "start",
    "step",
]


class Phase(enum.Enum):
    """FORMING: no generation yet. RUNNING: the current generation is whole. BROKEN: it is not, and there are
    too few nodes for the next. ENDED: failed or finished."""

    FORMING = "forming"
    RUNNING = "running"
    BROKEN = "broken"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class LeaderState:
    """`members`: live nodes in order of arrival. `fresh`: those of them whose workers are not those of the
    current generation. `finished`: nodes that are done and are not placed again. `unseen`: nodes of an
    adopted generation that have not shown up yet, lost at `unseen_until`. `waiting_since`: since when there
    have been too few nodes, or, while forming, since the last one joined. `reason`: why the next generation
    is needed."""

    policy: Policy
    next_number: int
    phase: Phase
    budget: Budget
    waiting_since: float
    started_at: float
    generation: Generation | None = None
    sealed_at: float = 0.0
    members: tuple[Member, ...] = ()
    fresh: frozenset[str] = frozenset()
    finished: frozenset[str] = frozenset()
    unseen: frozenset[str] = frozenset()
    unseen_until: float = 0.0
    restart_count: int = 0
    reason: str = ""


_Step = tuple[LeaderState, tuple[Effect, ...]]


def start(policy: Policy, *, first_generation: int, now: float) -> LeaderState:
    """A leader that knows nobody yet; its first generation will be `first_generation` (newer than any
    recorded)."""
    return LeaderState(
        policy=policy,
        next_number=first_generation,
        phase=Phase.FORMING,
        budget=Budget(policy.max_restarts, policy.progress_s, policy.max_failures),
        waiting_since=now,
        started_at=now,
    )


def step(state: LeaderState, event: Event) -> _Step:
    """One event. See the module's text for the caller's duties."""
    if state.phase is Phase.ENDED:
        return state, ()
    match event:
        case MemberUp():
            return _member_up(state, event)
        case MemberDown():
            return _member_down(state, event)
        case Broken():
            return _broken(state, event)
        case Finished():
            return _finished(state, event)
        case Tick():
            return _tick(state, event.now)
        case Adopted():
            return _adopted(state, event)


def _member_up(state: LeaderState, event: MemberUp) -> _Step:
    member, now = event.member, event.now
    known, placed = _member(state, member.node), _placed(state, member.node)
    if known is not None and member.incarnation <= known.incarnation:
        return state, ()
    if placed is not None and member.node in state.unseen and member.incarnation <= placed.incarnation:
        if member.incarnation < placed.incarnation:
            return state, ()
        seen = replace(state, members=(*state.members, member), unseen=state.unseen - {member.node})
        return _evaluate(seen, now)
    # A newer incarnation: the workers that the current generation counts on are gone.
    state, effects = _lose(state, (member.node,), _started_anew(member.node), now, -1)
    if effects:
        return state, effects
    state = replace(state, members=(*state.members, member), fresh=state.fresh | {member.node})
    if state.phase is Phase.FORMING:
        state = replace(state, waiting_since=now)
    return _evaluate(state, now)


def _member_down(state: LeaderState, event: MemberDown) -> _Step:
    known = _member(state, event.node)
    if known is None and event.node not in state.unseen:
        return state, ()
    if known is not None and event.incarnation is not None and event.incarnation < known.incarnation:
        return state, ()
    state, effects = _lose(state, (event.node,), f"node {event.node} left", event.now, event.step)
    return (state, effects) if effects else _evaluate(state, event.now)


def _broken(state: LeaderState, event: Broken) -> _Step:
    if state.phase is not Phase.RUNNING or not _counts(state, event.node, event.generation):
        return state, ()
    if event.node in state.finished:
        return state, ()
    state, effects = _charge(state, str(event.failure), event.failure, event.now, event.alive_s)
    return (state, effects) if effects else _evaluate(state, event.now)


def _finished(state: LeaderState, event: Finished) -> _Step:
    if not _counts(state, event.node, event.generation):
        return state, ()
    return _evaluate(replace(state, finished=state.finished | {event.node}), event.now)


def _tick(state: LeaderState, now: float) -> _Step:
    if state.unseen and now >= state.unseen_until:
        nodes = tuple(sorted(state.unseen))
        state, effects = _lose(state, nodes, f"{_nodes(nodes)} left", now, -1)
        if effects:
            return state, effects
    return _evaluate(state, now)


def _adopted(state: LeaderState, event: Adopted) -> _Step:
    found, now = event.generation, event.now
    if state.generation is not None and found.number <= state.generation.number:
        return state, ()
    policy, members = state.policy, state.members
    state = replace(
        state,
        next_number=max(state.next_number, found.number + 1),
        phase=Phase.RUNNING,
        budget=Budget(
            policy.max_restarts,
            policy.progress_s,
            policy.max_failures,
            found.failures,
            found.committed_step,
            found.first_failure,
        ),
        generation=found,
        sealed_at=now,
        members=(),
        fresh=frozenset(),
        unseen=frozenset(place.node for place in found.placements),
        unseen_until=now + policy.join_window_s,
        restart_count=found.restart_count,
        reason="",
    )
    effects: tuple[Effect, ...] = (WakeAt(state.unseen_until),)
    for member in members:
        state, effects = step(state, MemberUp(member, now))
    return state, effects


def _lose(state: LeaderState, nodes: tuple[str, ...], reason: str, now: float, committed: int) -> _Step:
    """`nodes` are gone. Effects only when that ends the job; otherwise the caller goes on to evaluate."""
    working = [node for node in nodes if _works(state, node)]
    state = replace(
        state,
        members=tuple(member for member in state.members if member.node not in nodes),
        fresh=state.fresh - set(nodes),
        unseen=state.unseen - set(nodes),
    )
    if not working or state.phase is not Phase.RUNNING:
        return state, ()
    failure = replace(node_left(working[0], committed), message=reason)
    return _charge(state, reason, failure, now, now - state.sealed_at)


def _charge(state: LeaderState, reason: str, failure: Failure, now: float, alive_s: float) -> _Step:
    """The current generation is broken, which is charged once. Effects only when that ends the job."""
    budget, allowed = state.budget.charge(failure.step, alive_s, failure)
    broken = replace(
        state,
        phase=Phase.BROKEN if allowed else Phase.ENDED,
        budget=budget,
        waiting_since=now,
        restart_count=state.restart_count + 1,
        reason=reason,
    )
    if allowed:
        return broken, ()
    count = "1 failure" if budget.failures == 1 else f"{budget.failures} failures"
    text = f"{count} without a new committed step ({budget.allowed} allowed); first: {budget.first}"
    return broken, (FailJob(text, budget.first),)


def _evaluate(state: LeaderState, now: float) -> _Step:
    """What follows from the state as it is now: seal, end, or wait until a time."""
    match state.phase:
        case Phase.FORMING:
            return _evaluate_forming(state, now)
        case Phase.RUNNING | Phase.BROKEN if _all_finished(state):
            return replace(state, phase=Phase.ENDED), (FinishJob(),)
        case Phase.RUNNING:
            return _evaluate_running(state, now)
        case Phase.BROKEN:
            return _evaluate_broken(state, now)
        case Phase.ENDED:
            return state, ()


def _evaluate_forming(state: LeaderState, now: float) -> _Step:
    policy, count = state.policy, len(state.members)
    if count < policy.nodes_min:
        return _too_few(state, now, state.started_at)
    window_ends = state.waiting_since + policy.join_window_s
    if count < policy.nodes_max and now < window_ends:
        return state, (WakeAt(window_ends),)
    return _seal(state, now, planned=False, reason=f"first round, {_count(min(count, policy.nodes_max))}")


def _evaluate_running(state: LeaderState, now: float) -> _Step:
    if state.generation is None:
        return state, ()
    if state.unseen:
        return state, (WakeAt(state.unseen_until),)
    newcomers = [member.node for member in _eligible(state) if member.node in state.fresh]
    # Once a node is done the job is about to end: a newcomer would only disturb it.
    if not newcomers or any(place.node in state.finished for place in state.generation.placements):
        return state, ()
    return _seal(state, now, planned=True, reason=f"{_nodes(newcomers)} joined")


def _evaluate_broken(state: LeaderState, now: float) -> _Step:
    if state.unseen:
        return state, (WakeAt(state.unseen_until),)
    eligible = _eligible(state)
    # Who has finished has done its part: the others may go on without it.
    if not eligible or len(eligible) + len(state.finished) < state.policy.nodes_min:
        return _too_few(state, now, state.waiting_since)
    newcomers = [
        member.node
        for member in eligible
        if member.node in state.fresh and state.reason != _started_anew(member.node)
    ]
    joined = f"; {_nodes(newcomers)} joined" if newcomers else ""
    return _seal(state, now, planned=False, reason=state.reason + joined)


def _all_finished(state: LeaderState) -> bool:
    """Whether all nodes of the current generation are done, or all of one that it only grew from.

    A node may say so after its lease was lost: its workers had finished all the same.
    """
    if state.generation is None:
        return False
    nodes = [place.node for place in state.generation.placements]
    sizes = [*(count for _, count in state.generation.grown_from), len(nodes)]
    return any(state.finished.issuperset(nodes[:size]) for size in sizes)


def _too_few(state: LeaderState, now: float, since: float) -> _Step:
    policy = state.policy
    deadline = since + policy.join_timeout_s
    if now < deadline:
        return state, (WakeAt(deadline),)
    text = (
        f"{_count(len(_eligible(state)))} for {policy.join_timeout_s:g} s, at least {policy.nodes_min} needed"
    )
    if state.finished:
        text += f" ({_nodes(sorted(state.finished))} already finished)"
    if state.budget.first is not None:
        text += f"; first failure: {state.budget.first}"
    return replace(state, phase=Phase.ENDED), (FailJob(text, state.budget.first),)


def _seal(state: LeaderState, now: float, *, planned: bool, reason: str) -> _Step:
    placements = place(_eligible(state))
    before = state.generation
    grown_from: tuple[tuple[int, int], ...] = ()
    if planned and before is not None:
        grown_from = (*before.grown_from, (before.number, len(before.placements)))
    generation = Generation(
        number=state.next_number,
        parent=-1 if before is None else before.number,
        placements=placements,
        world_size=sum(placement.nproc for placement in placements),
        planned=planned,
        reason=reason,
        restart_count=state.restart_count,
        failures=state.budget.failures,
        committed_step=state.budget.step,
        first_failure=state.budget.first,
        grown_from=grown_from,
    )
    inside = {placement.node for placement in placements}
    sealed = replace(
        state,
        next_number=state.next_number + 1,
        phase=Phase.RUNNING,
        generation=generation,
        sealed_at=now,
        fresh=frozenset(member.node for member in state.members if member.node not in inside),
        reason="",
    )
    return sealed, (Seal(generation),)


def _eligible(state: LeaderState) -> list[Member]:
    """Who would be in the next generation: survivors in their order, then newcomers as they came, up to the
    maximum."""
    live = [member for member in state.members if member.node not in state.finished]
    order = [] if state.generation is None else [place.node for place in state.generation.placements]
    survivors = [member for member in live if member.node not in state.fresh]
    survivors.sort(key=lambda member: order.index(member.node))
    newcomers = [member for member in live if member.node in state.fresh]
    return (survivors + newcomers)[: state.policy.nodes_max]


def _member(state: LeaderState, node: str) -> Member | None:
    return next((member for member in state.members if member.node == node), None)


def _placed(state: LeaderState, node: str) -> Placement | None:
    return None if state.generation is None else state.generation.placement(node)


def _counts(state: LeaderState, node: str, number: int) -> bool:
    """Whether news of `node` from generation `number` still counts: it is the current one, or that only grew
    from it."""
    nodes = None if state.generation is None else state.generation.nodes_of(number)
    return nodes is not None and node in nodes


def _works(state: LeaderState, node: str) -> bool:
    """Whether the current generation counts on this node."""
    return _placed(state, node) is not None and node not in state.fresh and node not in state.finished


def _count(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"


def _started_anew(node: str) -> str:
    return f"node {node} started anew"


def _nodes(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"node {names[0]}"
    return f"nodes {', '.join(names[:-1])} and {names[-1]}"
