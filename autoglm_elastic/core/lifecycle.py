"""The life of a job, a node and a rank: one table of legal transitions, and a tracker that keeps to it.

The diagram in the documentation is drawn from the table. Being told twice changes nothing; an illegal
transition raises.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final


class TaskState(enum.Enum):
    """INIT: not yet in a generation. CHECKPOINTING: training, with a snapshot in flight. RECOVERING: between
    two generations. PAUSED: left on request with a durable snapshot; a later start goes on. FAILED, DONE: for
    good."""

    INIT = "init"
    RUNNING = "running"
    CHECKPOINTING = "checkpointing"
    RECOVERING = "recovering"
    PAUSED = "paused"
    FAILED = "failed"
    DONE = "done"


TRANSITIONS: Final[Mapping[TaskState, frozenset[TaskState]]] = MappingProxyType(
    {
        TaskState.INIT: frozenset(
            {TaskState.RUNNING, TaskState.RECOVERING, TaskState.PAUSED, TaskState.FAILED}
        ),
        TaskState.RUNNING: frozenset(
            {
                TaskState.CHECKPOINTING,
                TaskState.RECOVERING,
                TaskState.PAUSED,
                TaskState.FAILED,
                TaskState.DONE,
            }
        ),
        TaskState.CHECKPOINTING: frozenset({TaskState.RUNNING, TaskState.RECOVERING, TaskState.FAILED}),
        TaskState.RECOVERING: frozenset(
            {TaskState.RUNNING, TaskState.PAUSED, TaskState.FAILED, TaskState.DONE}
        ),
        TaskState.PAUSED: frozenset({TaskState.RUNNING, TaskState.RECOVERING, TaskState.FAILED}),
        TaskState.FAILED: frozenset(),
        TaskState.DONE: frozenset(),
    }
)
"""RECOVERING → DONE: the others were already through when a rank had to be replaced."""


class IllegalTransition(ValueError):
    """A bug of ours: somebody announced something that cannot follow from what was announced before."""

    def __init__(self, before: TaskState, after: TaskState) -> None:
        self.before, self.after = before, after
        legal = ", ".join(state.value for state in TaskState if state in TRANSITIONS[before]) or "none"
        super().__init__(f"{before.value} cannot become {after.value}; valid: {legal}")


def advance(state: TaskState, to: TaskState) -> TaskState:
    """`to`, if the table allows it from `state`. Raises IllegalTransition; staying is not a transition."""
    if to not in TRANSITIONS[state]:
        raise IllegalTransition(state, to)
    return to


def diagram() -> str:
    """A mermaid state diagram of `TRANSITIONS`."""
    lines = ["stateDiagram-v2", f"    [*] --> {TaskState.INIT.name}"]
    for before in TaskState:
        lines += [
            f"    {before.name} --> {after.name}" for after in TaskState if after in TRANSITIONS[before]
        ]
        if not TRANSITIONS[before]:
            lines.append(f"    {before.name} --> [*]")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Sealed:
    """A generation was sealed: `nodes` in order, each with its ranks. Whoever is not in it is out."""

    generation: int
    nodes: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class RankMoved:
    """A rank of `generation` says what it is doing now. Of another generation: ignored."""

    generation: int
    rank: int
    state: TaskState


@dataclass(frozen=True, slots=True)
class SnapshotStarted:
    generation: int


@dataclass(frozen=True, slots=True)
class SnapshotSettled:
    """Committed, aborted or unknown: no longer in flight."""

    generation: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The job's end: PAUSED, FAILED or DONE."""

    state: TaskState


TrackerEvent = Sealed | RankMoved | SnapshotStarted | SnapshotSettled | Ended


@dataclass(frozen=True, slots=True)
class Change:
    """`what` is "job", "node a" or "rank 3"."""

    what: str
    before: TaskState
    after: TaskState


@dataclass(frozen=True, slots=True)
class StateTracker:
    """Which state the job, each node and each rank is in. Pure: `step` returns the next tracker and what
    changed.

    A node is as its ranks are: FAILED if one failed, RECOVERING until all run, DONE when all are done.
    """

    job: TaskState = TaskState.INIT
    generation: int = -1
    nodes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    ranks: tuple[TaskState, ...] = ()

    def node(self, name: str) -> TaskState | None:
        """The state of a node, or None for one that is not in the generation."""
        ranks = dict(self.nodes).get(name)
        return None if ranks is None else _together([self.ranks[rank] for rank in ranks])

    def step(self, event: TrackerEvent) -> tuple[StateTracker, tuple[Change, ...]]:
        """Raises IllegalTransition for what cannot follow."""
        after = self._next(event)
        changes = []
        if after.job is not self.job:
            changes.append(Change("job", self.job, after.job))
        for name, _ in after.nodes:
            before_node, after_node = self.node(name) or TaskState.INIT, after.node(name)
            if after_node is not None and after_node is not before_node:
                changes.append(Change(f"node {name}", before_node, after_node))
        for rank, state in enumerate(after.ranks):
            before = self.ranks[rank] if rank < len(self.ranks) else TaskState.INIT
            if state is not before:
                changes.append(Change(f"rank {rank}", before, state))
        return after, tuple(changes)

    def _next(self, event: TrackerEvent) -> StateTracker:
        match event:
            case Sealed():
                return self._sealed(event)
            case RankMoved():
                return self._rank_moved(event)
            case SnapshotStarted():
                return self._if_current(event.generation, {TaskState.RUNNING: TaskState.CHECKPOINTING})
            case SnapshotSettled():
                return self._if_current(event.generation, {TaskState.CHECKPOINTING: TaskState.RUNNING})
            case Ended():
                return replace(self, job=_move(self.job, event.state))

    def _sealed(self, event: Sealed) -> StateTracker:
        if event.generation <= self.generation:
            return self
        count = sum(len(ranks) for _, ranks in event.nodes)
        first = self.generation < 0
        state = TaskState.INIT if first else TaskState.RECOVERING
        job = self.job if first else _move(self.job, TaskState.RECOVERING)
        return StateTracker(job, event.generation, event.nodes, (state,) * count)

    def _rank_moved(self, event: RankMoved) -> StateTracker:
        if event.generation != self.generation or not 0 <= event.rank < len(self.ranks):
            return self
        states = list(self.ranks)
        states[event.rank] = _move(states[event.rank], event.state)
        moved = replace(self, ranks=tuple(states))
        if self.job in (TaskState.INIT, TaskState.RECOVERING) and all(
            state in (TaskState.RUNNING, TaskState.CHECKPOINTING, TaskState.DONE) for state in states
        ):
            return replace(moved, job=_move(self.job, TaskState.RUNNING))
        if event.state is TaskState.FAILED and self.job in (TaskState.RUNNING, TaskState.CHECKPOINTING):
            return replace(moved, job=_move(self.job, TaskState.RECOVERING))
        return moved

    def _if_current(self, generation: int, moves: Mapping[TaskState, TaskState]) -> StateTracker:
        to = moves.get(self.job)
        if generation != self.generation or to is None:
            return self
        return replace(self, job=_move(self.job, to))


def _move(state: TaskState, to: TaskState) -> TaskState:
    return state if state is to else advance(state, to)


def _together(states: list[TaskState]) -> TaskState:
    for state in (
        TaskState.FAILED,
        TaskState.RECOVERING,
        TaskState.INIT,
        TaskState.PAUSED,
        TaskState.CHECKPOINTING,
        TaskState.RUNNING,
    ):
        if state in states:
            return state
    return TaskState.DONE
