"""What a person sees of a running job, folded from its log lines: states, step, loss, and a line for what
matters.

Pure: no file, no clock, no terminal. `live` shows it.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from autoglm_elastic.core.lifecycle import (
    Ended,
    IllegalTransition,
    RankMoved,
    Sealed,
    StateTracker,
    TaskState,
    TrackerEvent,
)
from autoglm_elastic.observe import events
from autoglm_elastic.observe.events import EventRecord
from autoglm_elastic.observe.metrics import Metric
from autoglm_elastic.observe.text import count, duration, shortened, size

MESSAGES_MAX: Final = 200
LOSSES_MAX: Final = 60
REASON_CHARS_MAX: Final = 200
INCIDENTS_MAX: Final = 8
RATE_STEPS: Final = 50
"""The rate is that of the newest steps, at most so many."""


@dataclass(frozen=True, slots=True)
class Message:
    """One line for people. `kind` picks the colour: info, good, bad, note."""

    wall_time: float
    kind: str
    text: str


_SIGNALS: Final = {number.value: number.name for number in signal.Signals}


def _death(event: events.WorkerDied) -> str:
    number = -event.exit_code
    how = f"exit code {event.exit_code}" if number <= 0 else _SIGNALS.get(number, f"signal {number}")
    return f"rank {event.rank} on {event.node} died: {how}"


def trouble(event: events.Event) -> str:
    """What people must hear of although training goes on: something is wrong with the snapshots; else ""."""
    match event:
        case events.SnapshotAborted() | events.SnapshotFailed():
            return f"snapshot of step {event.step} was given up: {shortened(event.reason, REASON_CHARS_MAX)}"
        case events.GenerationUnrecorded():
            return f"no snapshots before the record of generation {event.generation} can be written"
        case events.StateTorn():
            return f"rank {event.rank} cannot be resumed from: {event.reason}"
        case events.SnapshotRejected():
            return f"snapshot {event.entry} does not verify: {event.reason}"
        case events.CleanupFailed():
            return f"old snapshots were not removed: {shortened(event.reason)}"
    return ""


@dataclass(frozen=True, slots=True)
class RankRow:
    """One rank of the current generation. `pid` 0 and `how` "": not known. `state`: how the log tells it."""

    rank: int
    node: str
    local_rank: int
    pid: int
    how: str
    state: TaskState


class Incident(msgspec.Struct, kw_only=True):
    """Generation `broke` broke. `seconds`: until the first committed step after it, in `generation`; None while it is
    open, or where nobody is left who knows. `restarted_s`: until all workers were started again; only of a job that has
    not committed a step, as scripts without `elastic.run` never do."""

    broke: int
    reason: str
    opened: float
    seconds: float | None = None
    restarted_s: float | None = None
    generation: int | None = None
    tier: str = ""
    from_step: int | None = None


class RunView:
    """Fold `on_event` and `on_metric` over the lines of a run; each returns the messages that are new."""

    def __init__(self) -> None:
        self.tracker = StateTracker()
        self.started: float | None = None
        self.wall_time = 0.0
        """Of the newest line."""
        self.run_id = ""
        self.generation = 0
        self.resumed = 0
        """The newest generation that has committed a step: training goes on when it is `generation`."""
        self.step = -1
        self.loss: float | None = None
        self._newest = (-1, -1)
        self.losses: deque[float] = deque(maxlen=LOSSES_MAX)
        self.failures = 0
        self.recoveries = 0
        self.steps_redone = 0
        self.snapshots = 0
        self.snapshot_step = -1
        self.messages: deque[Message] = deque(maxlen=MESSAGES_MAX)
        self.agents: dict[str, int] = {}
        """Process id of the agent, by node."""
        self.store_host = ""
        """The node whose agent serves the coordination store."""
        self._workers: dict[tuple[str, int], tuple[int, str]] = {}
        self.incidents: deque[Incident] = deque(maxlen=INCIDENTS_MAX)
        self._commits: deque[float] = deque(maxlen=RATE_STEPS)
        self._opened: float | None = None
        self._fault: float | None = None
        self._up: tuple[int, set[int]] = (0, set())
        """A generation, and the ranks that were started in it."""

    @property
    def world_size(self) -> int:
        return len(self.tracker.ranks)

    @property
    def steps_per_s(self) -> float | None:
        """Of the newest steps in one generation; None before the second."""
        commits = self._commits
        elapsed_s = commits[-1] - commits[0] if len(commits) > 1 else 0.0
        return (len(commits) - 1) / elapsed_s if elapsed_s > 0 else None

    def rows(self) -> list[RankRow]:
        """The rank table."""
        rows = []
        for node, ranks in self.tracker.nodes:
            for local_rank, rank in enumerate(ranks):
                pid, how = self._workers.get((node, local_rank), (0, ""))
                rows.append(RankRow(rank, node, local_rank, pid, how, self.tracker.ranks[rank]))
        return rows

    def on_metric(self, metric: Metric) -> None:
        """A committed step; one that is not newer than the newest is done again, or told again."""
        if (metric.generation, metric.step) == self._newest:
            return
        if metric.generation != self._newest[0]:
            self._commits.clear()
        self._commits.append(metric.wall_time)
        self._newest = (metric.generation, metric.step)
        self.steps_redone += max(0, self.step - metric.step + 1)
        self.step, self.loss = metric.step, metric.loss
        self.wall_time = max(self.wall_time, metric.wall_time)
        if metric.loss is not None:
            self.losses.append(metric.loss)

    def on_event(self, record: EventRecord) -> list[Message]:
        """The messages that this event is worth."""
        self.wall_time = max(self.wall_time, record.wall_time)
        event = record.event()
        if event is None:
            return []
        told = [Message(record.wall_time, kind, text) for kind, text in self._take(event, record.wall_time)]
        self.messages.extend(told)
        return told

    def _take(self, event: events.Event, now: float) -> list[tuple[str, str]]:
        match event:
            case events.JobStarted():
                self.started = now if self.started is None else self.started
                self.run_id = event.run_id
                self.agents[event.node] = event.pid
                if event.hosts_store:
                    self.store_host = event.node
                return [("info", f"agent {event.node} started (pid {event.pid})")]
            case events.GenerationSealed():
                return self._sealed(event, now)
            case events.WorkerStarted():
                self._workers[(event.node, event.local_rank)] = (event.pid, event.how)
                self._refill(event.rank)
                if event.generation > self._up[0]:
                    self._up = (event.generation, set())
                if event.generation == self._up[0]:
                    self._up[1].add(event.rank)
                return self._all_started(now)
            case events.WorkerDied():
                self._move([RankMoved(event.generation, event.rank, TaskState.FAILED)])
                return [("bad", event.message or _death(event))]
            case events.WorkerStuck():
                return [("bad", f"rank {event.rank} did not unwind within {event.waited_s:g} s: replaced")]
            case events.IncidentOpened():
                if not self._is_broken:
                    self._open(event.id, event.reason, now)
                return []
            case events.FaultInjected():
                self._fault = now
                return [("note", f"killed on purpose: {event.target}")]
            case events.IncidentClosed():
                return self._resumed(event)
            case events.SnapshotCommitted():
                self.snapshots += 1
                self.snapshot_step = event.step
                return [("note", f"snapshot of step {event.step} committed ({size(event.nbytes)})")]
            case events.SnapshotRolledBack():
                return [("note", f"rolled back to snapshot {event.entry}")]
            case events.FallbackSpawn():
                return [("note", f"{event.node} starts fresh interpreters: {event.reason}")]
            case events.ZygoteLost():
                return [("bad", f"{event.node} lost its zygote: {event.reason}")]
            case events.NodeLeft():
                return [("bad", f"{event.node} left: {event.reason}")]
            case events.JobFinished():
                for state in (TaskState.RUNNING, TaskState.DONE):  # also where no step was committed
                    self._move(RankMoved(self.generation, rank, state) for rank in range(self.world_size))
                self._move([Ended(TaskState.DONE)])
                return [("good", "finished")]
            case events.JobFailed():
                self._move([Ended(TaskState.FAILED)])
                return [("bad", f"failed: {event.reason}")]
            case events.JobStopped():
                self._move([Ended(TaskState.PAUSED)])
                if event.requeue:
                    return [("note", "stopped on request, with a snapshot: the same command goes on from it")]
                return [("note", f"stopped on signal {event.signal}")]
        text = trouble(event)
        return [("bad", text)] if text else []

    def _sealed(self, event: events.GenerationSealed, now: float) -> list[tuple[str, str]]:
        nprocs = event.nprocs or [event.world_size // max(1, len(event.nodes))] * len(event.nodes)
        nodes, base = [], 0
        for node, nproc in zip(event.nodes, nprocs, strict=False):
            nodes.append((node, tuple(range(base, base + nproc))))
            base += nproc
        if event.parent < 0:
            self.tracker = StateTracker()  # the command was started again: another life
        elif not event.planned and not self._is_broken:
            self._open(event.parent, event.reason, now)
        before = self.world_size
        self.generation = event.number
        self._move([Sealed(event.number, tuple(nodes))])
        world = f"{before} → {event.world_size}" if before else f"{event.world_size}"
        text = f"generation {event.number}: {world} workers on {count(len(event.nodes), 'node')}"
        return [("info", f"{text} ({event.reason})" if event.reason else text), *self._all_started(now)]

    @property
    def _is_broken(self) -> bool:
        return self._opened is not None and self.incidents[-1].restarted_s is None

    def _all_started(self, now: float) -> list[tuple[str, str]]:
        """A job without a committed step: all that can be seen of its progress is that its workers were started."""
        number, ranks = self._up
        if self.step >= 0 or number != self.generation or len(ranks) < self.world_size:
            return []
        self._move(RankMoved(number, rank, TaskState.RUNNING) for rank in ranks)
        if self._opened is None or not self._is_broken:
            return []
        self.recoveries += 1
        self.incidents[-1].restarted_s = now - self._opened
        return [("good", f"all workers were started again after {duration(now - self._opened)}")]

    def _open(self, broke: int, reason: str, now: float) -> None:
        self.failures += 1
        self._opened = now
        self.incidents.append(Incident(broke=broke, reason=reason, opened=now))

    def _resumed(self, event: events.IncidentClosed) -> list[tuple[str, str]]:
        ranks = range(self.world_size)
        self._move(RankMoved(event.generation, rank, TaskState.RUNNING) for rank in ranks)
        self.resumed = event.generation
        opened = self._opened if self._fault is None else self._fault
        broke, self._opened, self._fault = self._opened is not None, None, None
        if not broke:
            if event.tier == "fresh":
                return [("info", f"first step with {count(self.world_size, 'worker')}")]
            return [
                ("good", f"going on with {count(self.world_size, 'worker')} after step {event.from_step}")
            ]
        seconds = None if opened is None else event.committed_wall_time - opened
        if self.incidents:
            current = self.incidents[-1]
            self.recoveries += current.restarted_s is None
            current.seconds, current.generation = seconds, event.generation
            current.tier, current.from_step = event.tier, event.from_step
        return [
            (
                "good",
                f"back after {duration(seconds)}: step {event.step} on {count(self.world_size, 'worker')},"
                f" state {event.tier} from step {event.from_step}",
            )
        ]

    def _refill(self, rank: int) -> None:
        """A process that died on its way into a generation is replaced in it: a new task takes the rank."""
        states = list(self.tracker.ranks)
        if rank < len(states) and states[rank] is TaskState.FAILED:
            states[rank] = TaskState.INIT
            self.tracker = replace(self.tracker, ranks=tuple(states))

    def _move(self, moves: Iterable[TrackerEvent]) -> None:
        for move in moves:
            try:
                self.tracker, _ = self.tracker.step(move)
            except IllegalTransition:
                continue  # lines of several agents may arrive in another order than they were meant
