"""The table of a task's life and the tracker that keeps to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_elastic.core.lifecycle import (
    TRANSITIONS,
    Change,
    Ended,
    IllegalTransition,
    RankMoved,
    Sealed,
    SnapshotSettled,
    SnapshotStarted,
    StateTracker,
    TaskState,
    advance,
    diagram,
)

NODES = (("a", (0, 1)), ("b", (2, 3)))


def running(generation: int = 0) -> StateTracker:
    tracker, _ = StateTracker().step(Sealed(generation, NODES))
    for rank in range(4):
        tracker, _ = tracker.step(RankMoved(generation, rank, TaskState.RUNNING))
    return tracker


@pytest.mark.parametrize("before", TaskState)
@pytest.mark.parametrize("after", TaskState)
def test_advance_is_the_table(before: TaskState, after: TaskState) -> None:
    if after in TRANSITIONS[before]:
        assert advance(before, after) is after
    else:
        with pytest.raises(IllegalTransition, match=f"{before.value} cannot become {after.value}; valid: "):
            advance(before, after)


def test_every_state_is_reachable_and_only_two_are_final() -> None:
    assert {after for afters in TRANSITIONS.values() for after in afters} | {TaskState.INIT} == set(TaskState)
    assert {state for state in TaskState if not TRANSITIONS[state]} == {TaskState.FAILED, TaskState.DONE}


def test_the_diagram_shows_every_transition_once() -> None:
    drawn = [line.strip() for line in diagram().splitlines() if "-->" in line and "[*]" not in line]
    table = [f"{before.name} --> {after.name}" for before, afters in TRANSITIONS.items() for after in afters]
    assert sorted(drawn) == sorted(table)


def test_the_job_runs_when_all_its_ranks_do() -> None:
    tracker, _ = StateTracker().step(Sealed(0, NODES))
    for rank in range(3):
        tracker, _ = tracker.step(RankMoved(0, rank, TaskState.RUNNING))
    assert tracker.job is TaskState.INIT
    assert tracker.node("a") is TaskState.RUNNING
    assert tracker.node("b") is TaskState.INIT
    tracker, changes = tracker.step(RankMoved(0, 3, TaskState.RUNNING))
    assert Change("job", TaskState.INIT, TaskState.RUNNING) in changes
    assert Change("node b", TaskState.INIT, TaskState.RUNNING) in changes


def test_a_failure_a_new_generation_and_on_it_goes() -> None:
    tracker, changes = running().step(RankMoved(0, 1, TaskState.FAILED))
    assert tracker.job is TaskState.RECOVERING
    assert tracker.node("a") is TaskState.FAILED
    assert Change("rank 1", TaskState.RUNNING, TaskState.FAILED) in changes
    tracker, _ = tracker.step(Sealed(1, (("a", (0, 1)),)))
    assert tracker.node("b") is None
    for rank in range(2):
        tracker, _ = tracker.step(RankMoved(1, rank, TaskState.RUNNING))
    assert tracker.job is TaskState.RUNNING
    tracker, _ = tracker.step(Ended(TaskState.DONE))
    assert tracker.job is TaskState.DONE


def test_a_snapshot_is_a_phase_of_the_job() -> None:
    tracker, _ = running().step(SnapshotStarted(0))
    assert tracker.job is TaskState.CHECKPOINTING
    tracker, _ = tracker.step(SnapshotSettled(0))
    assert tracker.job is TaskState.RUNNING


def test_what_is_stale_or_said_twice_changes_nothing() -> None:
    tracker = running(3)
    for event in (
        Sealed(3, ()),
        Sealed(2, ()),
        RankMoved(2, 0, TaskState.FAILED),
        RankMoved(3, 9, TaskState.FAILED),
        RankMoved(3, 0, TaskState.RUNNING),
        SnapshotStarted(2),
        SnapshotSettled(3),
    ):
        assert tracker.step(event) == (tracker, ())


def test_what_cannot_follow_raises() -> None:
    tracker, _ = running().step(Ended(TaskState.FAILED))
    with pytest.raises(IllegalTransition):
        tracker.step(Ended(TaskState.DONE))


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(TaskState)), max_size=30))
def test_only_legal_changes_are_ever_reported(moves: list[tuple[int, TaskState]]) -> None:
    tracker, _ = StateTracker().step(Sealed(0, NODES))
    for rank, state in moves:
        try:
            tracker, changes = tracker.step(RankMoved(0, rank, state))
        except IllegalTransition:
            continue
        for change in changes:
            if not change.what.startswith("node"):
                assert change.after in TRANSITIONS[change.before]
