"""The leader: turns who is alive and what broke into sealed generations.

Any agent can lead; the one that does feeds this machine and carries out its effects. Its duties, in order:

1. `start`; if a sealed generation is found in the store, `Adopted` first, then who has `Entered` it; then
   `MemberUp` for every live member, then what was reported since (`Broken`, `Finished`) and, from then on,
   every change.
2. `Seal`: one transaction (the generation key unchanged since it was read, and still the leader). On
   CONFLICT, or when an unknown outcome turns out to be one, drop this state and begin at 1: somebody else
   leads, or led meanwhile.
3. `WakeAt(time)`: feed `Tick` then (or later). A newer `WakeAt` replaces an older one.
4. After `FailJob` or `FinishJob` nothing more comes.

Events may be duplicated or late: what names another generation than the current one, or an older incarnation,
is ignored.

One incident is charged to the restart budget once: a generation breaks once, however many of its workers die;
and a node that is missed only after the next generation was sealed, and has not entered it (`unheard`), went
down with the failure, whoever reported that first: a host may lose a worker, say so, and be gone a moment
later. A leader that has no part in the generation it finds counts all its nodes as unheard: perhaps they are all
gone, and the job was started again.

A planned generation is entered at a boundary; until then the one it grew from runs on, and may end there:
news of it still counts (`Generation.nodes_of`). For an agent that means: workers that end well in a
generation that the newest one grew from are reported `Finished` in *that* generation; in any other older one
they came too late, and the newest one needs new workers in their place.
"""

from __future__ import annotations

from dataclasses import replace

from autoglm_elastic.core._leader import LeaderState, Phase, start
from autoglm_elastic.core._rounds import Step, evaluate, nodes_text, started_anew
from autoglm_elastic.core.budget import Budget
from autoglm_elastic.core.failure import Failure, node_left
from autoglm_elastic.core.generation import Generation, Member, Placement
from autoglm_elastic.core.news import (
    Adopted,
    Broken,
    Effect,
    Entered,
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
    "Entered",
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


def step(state: LeaderState, event: Event) -> Step:
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
        case Entered():
            return _entered(state, event)
        case Finished():
            return _finished(state, event)
        case Tick():
            return _tick(state, event.now)
        case Adopted():
            return _adopted(state, event)


def _member_up(state: LeaderState, event: MemberUp) -> Step:
    member, now = event.member, event.now
    known, placed = state.member(member.node), state.placed(member.node)
    if known is not None and member.incarnation <= known.incarnation:
        return state, ()
    if placed is not None and member.node in state.unseen and member.incarnation <= placed.incarnation:
        if member.incarnation < placed.incarnation:
            return state, ()
        seen = replace(state, members=(*state.members, member), unseen=state.unseen - {member.node})
        return evaluate(seen, now)
    # A newer incarnation: the workers that the current generation counts on are gone.
    if known is not None or placed is not None:
        state, effects = _lose(state, (member.node,), started_anew(member.node), now, -1)
        if effects:
            return state, effects
    state = replace(state, members=(*state.members, member), fresh=state.fresh | {member.node})
    if state.phase is Phase.FORMING:
        state = replace(state, waiting_since=now)
    return evaluate(state, now)


def _member_down(state: LeaderState, event: MemberDown) -> Step:
    known = state.member(event.node)
    if known is None and event.node not in state.unseen:
        return state, ()
    if known is not None and event.incarnation is not None and event.incarnation < known.incarnation:
        return state, ()
    state, effects = _lose(state, (event.node,), f"node {event.node} left", event.now, event.step)
    return (state, effects) if effects else evaluate(state, event.now)


def _broken(state: LeaderState, event: Broken) -> Step:
    if state.phase is not Phase.RUNNING or not state.counts(event.node, event.generation):
        return state, ()
    if event.node in state.finished:
        return state, ()
    state, effects = _charge(state, str(event.failure), event.failure, event.now, event.alive_s)
    return (state, effects) if effects else evaluate(state, event.now)


def _entered(state: LeaderState, event: Entered) -> Step:
    # While BROKEN nothing newer than the failure can have been entered; nor is there anything newer than what
    # an inherited generation's nodes may have died of.
    if state.phase is not Phase.RUNNING or state.inherited or not state.counts(event.node, event.generation):
        return state, ()
    return replace(state, unheard=state.unheard - {event.node}), ()


def _finished(state: LeaderState, event: Finished) -> Step:
    if not state.counts(event.node, event.generation):
        return state, ()
    return evaluate(replace(state, finished=state.finished | {event.node}), event.now)


def _tick(state: LeaderState, now: float) -> Step:
    if state.unseen and now >= state.unseen_until:
        nodes = tuple(sorted(state.unseen))
        state, effects = _lose(state, nodes, f"{nodes_text(nodes)} left", now, -1)
        if effects:
            return state, effects
    return evaluate(state, now)


def _adopted(state: LeaderState, event: Adopted) -> Step:
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
        unheard=frozenset(found.unheard if event.inside else (place.node for place in found.placements)),
        inherited=not event.inside,
        restart_count=found.restart_count,
        reason="",
    )
    effects: tuple[Effect, ...] = (WakeAt(state.unseen_until),)
    for member in members:
        state, effects = step(state, MemberUp(member, now))
    return state, effects


def _lose(state: LeaderState, nodes: tuple[str, ...], reason: str, now: float, committed: int) -> Step:
    """`nodes` are gone. Effects only when that ends the job; otherwise the caller goes on to evaluate."""
    working = [node for node in nodes if state.works(node)]
    went_before = state.unheard.issuperset(working)
    state = replace(
        state,
        members=tuple(member for member in state.members if member.node not in nodes),
        fresh=state.fresh - set(nodes),
        unseen=state.unseen - set(nodes),
        unheard=state.unheard - set(nodes),
    )
    if not working or state.phase is not Phase.RUNNING:
        return state, ()
    if went_before:
        # The leader before has counted the restart after a failure that it knew of; no other was counted.
        known = state.generation is not None and set(state.generation.unheard).issuperset(working)
        restarts = state.restart_count + int(state.inherited and not known)
        broken = replace(state, phase=Phase.BROKEN, waiting_since=now, restart_count=restarts, reason=reason)
        return broken, ()
    failure = replace(node_left(working[0], committed), message=reason)
    return _charge(state, reason, failure, now, now - state.sealed_at)


def _charge(state: LeaderState, reason: str, failure: Failure, now: float, alive_s: float) -> Step:
    """The current generation is broken, which is charged once. Effects only when that ends the job."""
    budget, allowed = state.budget.charge(failure.step, alive_s, failure)
    broken = replace(
        state,
        phase=Phase.BROKEN if allowed else Phase.ENDED,
        budget=budget,
        waiting_since=now,
        unheard=state.working(),
        restart_count=state.restart_count + 1,
        reason=reason,
    )
    if allowed:
        return broken, ()
    count = "1 failure" if budget.failures == 1 else f"{budget.failures} failures"
    text = f"{count} without a new committed step ({budget.allowed} allowed); first: {budget.first}"
    return broken, (FailJob(text, budget.first),)
