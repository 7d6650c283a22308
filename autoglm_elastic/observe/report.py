"""What a run went through, derived from its event log and its metrics: incidents, snapshots, goodput.

May touch: two files, for reading. Must never: guess. What the log does not tell is None, and printed as
unknown.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from autoglm_elastic.errors import UsageError
from autoglm_elastic.observe import events, metrics, presence
from autoglm_elastic.observe.events import EVENTS_NAME, METRICS_NAME, EventRecord
from autoglm_elastic.observe.metrics import Metric

_ENDS: Final = {"job.finished": "done", "job.failed": "failed", "job.stopped": "stopped"}


class Incident(msgspec.Struct, kw_only=True):
    """From a fault to the first committed step after it, in a new generation. Times in seconds since the
    epoch."""

    broke: int
    """The generation that broke; if the one after it broke before its first step, that belongs to this
    incident."""
    reason: str
    node: str = ""
    rank: int = -1
    opened: float
    fault: float | None = None
    """When it was broken on purpose (`fault.injected`); None when nobody noted it."""
    closed: float | None = None
    """First committed step; None while it is open, or when the job ended in it."""
    restarted: float | None = None
    """When all workers had been started again; only of a job that had not committed a step, as scripts without
    `elastic.run` never do."""
    generation: int | None = None
    """The generation that goes on."""
    tier: str = ""
    plan: str = ""
    from_step: int | None = None
    steps_lost: int | None = None
    """Steps that had been committed and are redone."""
    world_before: int | None = None
    world_after: int | None = None
    phases_s: dict[str, float] = {}

    @property
    def seconds(self) -> float | None:
        """From the fault, or else from when it was seen, to the first committed step."""
        return (
            None if self.closed is None else self.closed - (self.opened if self.fault is None else self.fault)
        )


class Change(msgspec.Struct, kw_only=True):
    """A generation that began without a fault: the first one, a resumption, growth."""

    kind: Literal["start", "resume", "growth"]
    generation: int
    committed: float
    from_step: int
    world_before: int | None
    world_after: int | None
    phases_s: dict[str, float] = {}


class Span(msgspec.Struct, kw_only=True):
    """A sealed generation: from its seal to the next one's, or to the end of the log."""

    generation: int
    parent: int
    start: float
    end: float
    world_size: int
    nodes: list[str]
    planned: bool
    reason: str


class SnapshotNote(msgspec.Struct, kw_only=True):
    """A snapshot that was committed, or was tried in vain (`outcome` says what became of it)."""

    outcome: Literal["committed", "aborted", "failed", "rejected"]
    wall_time: float
    step: int = -1
    entry: str = ""
    nbytes: int = 0
    seconds: float = 0.0
    stall_s: float = 0.0
    reason: str = ""


class Report(msgspec.Struct, kw_only=True):
    """All that `autoglm report` tells. Goodput: see `goodput`."""

    run_id: str
    status: Literal["running", "done", "failed", "stopped", "cut off"]
    """cut off: it has not ended, and no agent is left."""
    reason: str
    started: float
    ended: float
    wall_s: float
    startup_s: float | None
    """From the start of the first agent to the first committed step."""
    step: int
    """Newest committed step, -1 for none."""
    loss: float | None
    steps_committed: int
    """Steps that count: of the lineage."""
    steps_redone: int
    """Committed steps that were abandoned and done again."""
    committed_s: float
    goodput: float | None
    incidents: list[Incident]
    changes: list[Change]
    spans: list[Span]
    snapshots: list[SnapshotNote]
    log_faults: int


def build(run_dir: str | os.PathLike[str]) -> Report:
    """The report of a run directory. Raises UsageError when it holds no event log."""
    root = Path(run_dir)
    if not (root / EVENTS_NAME).is_file():
        raise UsageError(
            f"no {EVENTS_NAME} in {root}",
            valid="the run directory of a job (autoglm-run --run-dir)",
            do=f"ls {root}",
        )
    told = from_records(list(events.read(root / EVENTS_NAME)), list(metrics.read(root / METRICS_NAME)))
    if told.status == "running" and presence.alive(presence.read(root)) is False:
        told.status = "cut off"
    return told


def from_records(records: Sequence[EventRecord], steps: Sequence[Metric]) -> Report:
    """The report of records in the order of their files."""
    started = min((r.wall_time for r in records if r.name == "job.started"), default=None)
    if started is None:
        started = min((r.wall_time for r in records), default=0.0)
    status, reason, ended = _status(records, steps, started)
    spans = _spans(records, ended)
    incidents, changes = _incidents(records, steps, spans)
    snapshots = _snapshots(records)
    chain = metrics.lineage(steps)
    committed_s = committed_seconds(chain) - sum(s.stall_s for s in snapshots if s.outcome == "committed")
    wall_s = max(0.0, ended - started)
    job = next((r.event() for r in records if r.name == "job.started"), None)
    return Report(
        run_id=job.run_id if isinstance(job, events.JobStarted) else "",
        status=status,
        reason=reason,
        started=started,
        ended=ended,
        wall_s=wall_s,
        startup_s=chain[0].wall_time - started if chain else None,
        step=chain[-1].step if chain else -1,
        loss=chain[-1].loss if chain else None,
        steps_committed=len(chain),
        steps_redone=len(steps) - len(chain),
        committed_s=committed_s,
        goodput=committed_s / wall_s if chain and wall_s > 0 else None,
        incidents=incidents,
        changes=changes,
        spans=spans,
        snapshots=snapshots,
        log_faults=sum(r.name == "log.fault" for r in records),
    )


def committed_seconds(chain: Sequence[Metric]) -> float:
    """Seconds spent in the committed steps that count: the numerator of goodput.

    Goodput = (this - the stalls of committed snapshots) ÷ wall time, where

    - wall time goes from the start of the first agent to the end of the job (of a running one: to its newest
      line). It contains starting up, incidents, down time between two starts of the command, and the time
      after the last step;
    - only steps of the lineage count: of a step that was redone the abandoned doing does not;
    - a step took the time since the commit before it in the same generation. The first step of a generation
      has no such commit: it counts as the median step of its generation, and never more than the time since
      any earlier commit.
    """
    by_generation: dict[int, list[Metric]] = {}
    for metric in chain:
        by_generation.setdefault(metric.generation, []).append(metric)
    total, before = 0.0, None
    for group in by_generation.values():
        durations = [
            max(0.0, b.wall_time - a.wall_time) / (b.step - a.step) for a, b in itertools.pairwise(group)
        ]
        first = statistics.median(durations) if durations else 0.0
        if before is not None:
            first = min(first, max(0.0, group[0].wall_time - before))
        total += first + max(0.0, group[-1].wall_time - group[0].wall_time)
        before = group[-1].wall_time
    return total


def _status(
    records: Sequence[EventRecord], steps: Sequence[Metric], started: float
) -> tuple[Literal["running", "done", "failed", "stopped"], str, float]:
    """(status, reason, end). A command that was started again after an end runs again."""
    end: EventRecord | None = None
    for record in records:
        if record.name in _ENDS:
            if end is None or record.name != "job.finished" or end.name == record.name:
                end = record
        elif record.name == "job.started":
            end = None
    newest = max([r.wall_time for r in records] + [m.wall_time for m in steps], default=started)
    match end.event() if end is not None else None:
        case events.JobFinished():
            return "done", "", end.wall_time if end else newest
        case events.JobFailed(reason=reason):
            return "failed", reason, end.wall_time if end else newest
        case events.JobStopped(signal=number):
            return "stopped", f"signal {number}", end.wall_time if end else newest
    return "running", "", newest


def _spans(records: Iterable[EventRecord], ended: float) -> list[Span]:
    spans: list[Span] = []
    for record in records:
        event = record.event()
        if isinstance(event, events.GenerationSealed):
            if spans:
                spans[-1].end = record.wall_time
            spans.append(
                Span(
                    generation=event.number,
                    parent=event.parent,
                    start=record.wall_time,
                    end=max(ended, record.wall_time),
                    world_size=event.world_size,
                    nodes=event.nodes,
                    planned=event.planned,
                    reason=event.reason,
                )
            )
    return spans


def _incidents(
    records: Sequence[EventRecord], steps: Sequence[Metric], spans: Sequence[Span]
) -> tuple[list[Incident], list[Change]]:
    worlds = {span.generation: span.world_size for span in spans}
    planned = {span.generation for span in spans if span.planned}
    incidents: list[Incident] = []
    changes: list[Change] = []
    fault: float | None = None
    newest_resumed = -1
    started: dict[int, set[int]] = {}
    for record in records:
        event = record.event()
        current = incidents[-1] if incidents and incidents[-1].closed is None else None
        broken = current if current is not None and current.restarted is None else None
        if isinstance(event, events.FaultInjected):
            fault = record.wall_time
        elif isinstance(event, events.WorkerStarted) and newest_resumed < 0:
            ranks = started.setdefault(event.generation, set())
            ranks.add(event.rank)
            if (
                broken is not None
                and event.generation > broken.broke
                and len(ranks) == worlds.get(event.generation)
            ):
                broken.restarted, broken.world_after = record.wall_time, len(ranks)
        elif isinstance(event, events.IncidentOpened) and broken is None and event.id >= newest_resumed:
            incidents.append(
                Incident(
                    broke=event.id,
                    reason=event.reason,
                    node=event.node,
                    rank=event.rank,
                    opened=record.wall_time,
                    fault=fault,
                    world_before=worlds.get(event.id),
                )
            )
            fault = None
        elif isinstance(event, events.GenerationSealed) and broken is None:
            # A node that is gone cannot say so; the seal of what goes on without it is the first news.
            if not event.planned and event.parent >= max(0, newest_resumed):
                incidents.append(
                    Incident(
                        broke=event.parent,
                        reason=event.reason,
                        opened=record.wall_time,
                        fault=fault,
                        world_before=worlds.get(event.parent),
                    )
                )
                fault = None
        elif isinstance(event, events.IncidentClosed) and event.generation > newest_resumed:
            before = [m for m in steps if m.generation < event.generation]
            parent = before[-1].generation if before else event.parent
            world_after = worlds.get(event.generation)
            if current is not None:
                _close(current, event, metrics.lineage(before), world_after)
            else:
                kind: Literal["start", "resume", "growth"] = "start" if event.tier == "fresh" else "resume"
                if event.generation in planned:
                    kind = "growth"
                changes.append(
                    Change(
                        kind=kind,
                        generation=event.generation,
                        committed=event.committed_wall_time,
                        from_step=event.from_step,
                        world_before=worlds.get(parent),
                        world_after=world_after,
                        phases_s=event.phases_s,
                    )
                )
            newest_resumed = event.generation
    return incidents, changes


def _close(
    incident: Incident, event: events.IncidentClosed, before: Sequence[Metric], world_after: int | None
) -> None:
    incident.closed = event.committed_wall_time
    incident.generation = event.generation
    incident.tier = event.tier
    incident.plan = event.reason
    incident.from_step = event.from_step
    incident.world_after = world_after
    incident.phases_s = dict(event.phases_s)
    if incident.fault is not None and incident.seconds is not None:
        # Rank 0 counts from when it knew, without a gap: what is left is the time from the fault until then.
        incident.phases_s["detect"] = max(0.0, incident.seconds - sum(event.phases_s.values()))
    if before:
        incident.steps_lost = max(0, before[-1].step - event.from_step)


def _snapshots(records: Iterable[EventRecord]) -> list[SnapshotNote]:
    notes: list[SnapshotNote] = []
    for record in records:
        match record.event():
            case events.SnapshotCommitted() as event:
                notes.append(
                    SnapshotNote(
                        outcome="committed",
                        wall_time=record.wall_time,
                        step=event.step,
                        entry=event.entry,
                        nbytes=event.nbytes,
                        seconds=event.seconds,
                        stall_s=event.stall_s,
                    )
                )
            case events.SnapshotAborted(step=step, reason=reason):
                notes.append(_failed("aborted", record, reason, step=step))
            case events.SnapshotFailed(step=step, reason=reason):
                notes.append(_failed("failed", record, reason, step=step))
            case events.SnapshotRejected(entry=entry, reason=reason):
                notes.append(_failed("rejected", record, reason, entry=entry))
    return notes


def _failed(
    outcome: Literal["aborted", "failed", "rejected"],
    record: EventRecord,
    reason: str,
    *,
    step: int = -1,
    entry: str = "",
) -> SnapshotNote:
    return SnapshotNote(outcome=outcome, wall_time=record.wall_time, step=step, entry=entry, reason=reason)
