"""When the leader seals the next generation, and what is in it; when it waits, and when it gives up.

Asked after every event that `membership` has taken in; changes nothing but what a seal or an end changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autoglm_elastic.core._leader import LeaderState, Phase
from autoglm_elastic.core.generation import Generation, place
from autoglm_elastic.core.news import Effect, FailJob, FinishJob, Seal, WakeAt

Step = tuple[LeaderState, tuple[Effect, ...]]


def evaluate(state: LeaderState, now: float) -> Step:
    """What follows from the state as it is now: seal, end, or wait until a time."""
    match state.phase:
        case Phase.FORMING:
            return _forming(state, now)
        case Phase.RUNNING | Phase.BROKEN if state.all_finished():
            return replace(state, phase=Phase.ENDED), (FinishJob(),)
        case Phase.RUNNING:
            return _running(state, now)
        case Phase.BROKEN:
            return _broken(state, now)
        case Phase.ENDED:
            return state, ()


def started_anew(node: str) -> str:
    """The reason of a generation that replaces one whose `node` came back as a newer incarnation."""
    return f"node {node} started anew"


def nodes_text(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"node {names[0]}"
    return f"nodes {', '.join(names[:-1])} and {names[-1]}"


def _forming(state: LeaderState, now: float) -> Step:
    policy, count = state.policy, len(state.members)
    if count < policy.nodes_min:
        return _too_few(state, now, state.started_at)
    window_ends = state.waiting_since + policy.join_window_s
    if count < policy.nodes_max and now < window_ends:
        return state, (WakeAt(window_ends),)
    return _seal(state, now, planned=False, reason=f"first round, {_count(min(count, policy.nodes_max))}")


def _running(state: LeaderState, now: float) -> Step:
    if state.generation is None:
        return state, ()
    if state.unseen:
        return state, (WakeAt(state.unseen_until),)
    if not state.fresh:
        return state, ()
    newcomers = [member.node for member in state.eligible() if member.node in state.fresh]
    # Once a node is done the job is about to end: a newcomer would only disturb it.
    if not newcomers or any(place.node in state.finished for place in state.generation.placements):
        return state, ()
    return _seal(state, now, planned=True, reason=f"{nodes_text(newcomers)} joined")


def _broken(state: LeaderState, now: float) -> Step:
    if state.unseen:
        return state, (WakeAt(state.unseen_until),)
    eligible = state.eligible()
    # Who has finished has done its part: the others may go on without it.
    if not eligible or len(eligible) + len(state.finished) < state.policy.nodes_min:
        return _too_few(state, now, state.waiting_since)
    newcomers = [
        member.node
        for member in eligible
        if member.node in state.fresh and state.reason != started_anew(member.node)
    ]
    joined = f"; {nodes_text(newcomers)} joined" if newcomers else ""
    return _seal(state, now, planned=False, reason=state.reason + joined)


def _too_few(state: LeaderState, now: float, since: float) -> Step:
    policy = state.policy
    deadline = since + policy.join_timeout_s
    if now < deadline:
        return state, (WakeAt(deadline),)
    text = (
        f"{_count(len(state.eligible()))} for {policy.join_timeout_s:g} s, at least {policy.nodes_min} needed"
    )
    if state.finished:
        text += f" ({nodes_text(sorted(state.finished))} already finished)"
    if state.budget.first is not None:
        text += f"; first failure: {state.budget.first}"
    return replace(state, phase=Phase.ENDED), (FailJob(text, state.budget.first),)


def _seal(state: LeaderState, now: float, *, planned: bool, reason: str) -> Step:
    placements = place(state.eligible())
    before = state.generation
    grown_from: tuple[tuple[int, int], ...] = ()
    if planned and before is not None:
        grown_from = (*before.grown_from, (before.number, len(before.placements)))
    inside = frozenset(placement.node for placement in placements)
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
        unheard=tuple(sorted(state.unheard & inside)),
    )
    sealed = replace(
        state,
        next_number=state.next_number + 1,
        phase=Phase.RUNNING,
        generation=generation,
        sealed_at=now,
        fresh=frozenset(member.node for member in state.members if member.node not in inside),
        unheard=state.unheard & inside,
        inherited=False,
        reason="",
    )
    return sealed, (Seal(generation),)


def _count(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"
