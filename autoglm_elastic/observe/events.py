"""The event log: what happened in a run, as JSON lines of a closed set of names and fields.

One class below is one event; its docstring and fields are the documentation (`docs/events.md` is drawn from
them). A line is `{"wall_time": …, "source": …, "name": …, "fields": {…}}`. Every agent of a run appends to
the same `RUN/events.jsonl`.

May touch: one file, opened for appending. Must never: raise into the caller, stop training, or write an event
whose name or fields are not listed here. What could not be written is counted in `EventLog.faults`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Final, Literal

import msgspec

from autoglm_elastic.observe import _lines

LINE_BYTES_MAX: Final = 4096
"""A line is written with one `write` and is smaller than this; longer texts and lists are cut to fit."""

EVENTS_NAME: Final = "events.jsonl"
METRICS_NAME: Final = "metrics.jsonl"
"""Names of the two files under the run directory. For the second see `autoglm_elastic.observe.metrics`."""

PHASES: Final = ("detect", "unwind", "seal", "group", "plan", "state", "first_step")
"""The phases of a recovery, in order, without a gap: keys of `IncidentClosed.phases_s`. `detect`: fault → rank
0 knows (only in reports, where the time of the fault was noted); `unwind`: → out of the user's function and of
the broken groups; `seal`: → the new generation is known; `group`: → process groups exist; `plan`: → decided what
to resume from; `state`: → every rank has it; `first_step`: → first committed step."""

_TEXT_CHARS_MAX: Final = 240
_LIST_ITEMS_MAX: Final = 8


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all events. `event_name` is the name in the log."""

    event_name: ClassVar[str]


class JobStarted(Event, frozen=True, kw_only=True):
    """An agent started on this run directory. Written by every agent, and again when the command is started
    again."""

    event_name: ClassVar = "job.started"
    run_id: str
    node: str
    command: list[str] = []
    nproc: int = 0
    pid: int = 0
    """Of the agent."""
    store: str = ""
    """host:port of the coordination store; the agent whose `hosts_store` is true serves it."""
    hosts_store: bool = False


class JobFinished(Event, frozen=True, kw_only=True):
    """The user's function returned on every rank."""

    event_name: ClassVar = "job.finished"
    step: int = -1
    generation: int = 0


class JobFailed(Event, frozen=True, kw_only=True):
    """The job ended for good; `reason` names the first error."""

    event_name: ClassVar = "job.failed"
    reason: str
    generation: int = 0
    exit_code: int = 1


class JobStopped(Event, frozen=True, kw_only=True):
    """The job left on request (signal) at an agreed step; `requeue`: a durable snapshot exists, start it
    again."""

    event_name: ClassVar = "job.stopped"
    signal: int
    step: int = -1
    requeue: bool = False


class NodeJoined(Event, frozen=True, kw_only=True):
    """An agent became a member."""

    event_name: ClassVar = "node.joined"
    node: str
    host: str = ""
    nproc: int = 0
    incarnation: int = 0


class NodeLeft(Event, frozen=True, kw_only=True):
    """A member left: it said so, or its lease expired."""

    event_name: ClassVar = "node.left"
    node: str
    reason: str = ""


class GenerationSealed(Event, frozen=True, kw_only=True):
    """The leader sealed a membership. `planned`: the old one was left at a step boundary; otherwise it had
    broken (or there was none). `nodes` in the order of their ranks."""

    event_name: ClassVar = "generation.sealed"
    number: int
    parent: int
    world_size: int
    nodes: list[str]
    nprocs: list[int] = []
    """Workers of each node; when empty, all nodes have as many."""
    planned: bool
    reason: str = ""
    restart_count: int = 0


class GenerationUnrecorded(Event, frozen=True, kw_only=True):
    """The lineage record of `generation` could not be written. Training goes on; no snapshot is committed
    before it is written."""

    event_name: ClassVar = "generation.unrecorded"
    generation: int
    reason: str


class StateTorn(Event, frozen=True, kw_only=True):
    """A survivor left generation `generation` between an optimizer's step and the commit: what it holds is of
    no step, and nobody resumes from it. When all survivors say so, the newest snapshot is what is left."""

    event_name: ClassVar = "state.torn"
    generation: int
    rank: int
    step: int
    """The newest committed one."""
    reason: str


class WorkerStarted(Event, frozen=True, kw_only=True):
    """A worker process exists."""

    event_name: ClassVar = "worker.started"
    rank: int
    local_rank: int
    node: str
    pid: int
    generation: int
    how: Literal["fork", "spawn"]


class WorkerDied(Event, frozen=True, kw_only=True):
    """A worker ended other than by returning. `exit_code` is negative for a signal; `message` is one line."""

    event_name: ClassVar = "worker.died"
    rank: int
    local_rank: int
    node: str
    pid: int
    generation: int
    exit_code: int
    message: str = ""
    step: int = -1
    """Newest committed step that it had noted."""


class WorkerStuck(Event, frozen=True, kw_only=True):
    """A survivor did not unwind within its limit and was killed."""

    event_name: ClassVar = "worker.stuck"
    rank: int
    node: str
    pid: int
    generation: int
    waited_s: float


class IncidentOpened(Event, frozen=True, kw_only=True):
    """Generation `id` broke. Several agents may say so; the earliest counts. `node` is where the fault
    was."""

    event_name: ClassVar = "incident.opened"
    id: int
    reason: str
    node: str = ""
    rank: int = -1


class IncidentClosed(Event, frozen=True, kw_only=True):
    """First committed step of a generation, as rank 0 of it tells (`wire.Resumed`). Also written for a
    generation that was not preceded by a fault (the first one, planned growth): then no `incident.opened`
    names its parent."""

    event_name: ClassVar = "incident.closed"
    generation: int
    parent: int = -1
    step: int
    from_step: int
    """Where the plan resumed: the newest step that is not redone; -1 for none."""
    tier: str
    """live, disk or fresh."""
    reason: str = ""
    committed_wall_time: float
    phases_s: dict[str, float] = {}


class SnapshotCommitted(Event, frozen=True, kw_only=True):
    """A snapshot is in the catalog. `seconds`: from the trigger to the commit. `stall_s`: training stood
    still."""

    event_name: ClassVar = "snapshot.committed"
    step: int
    generation: int
    entry: str
    nbytes: int = 0
    seconds: float = 0.0
    stall_s: float = 0.0
    coalesced: int = 0
    """Triggers since the last one that found a snapshot in flight: each was late or came to nothing."""


class SnapshotAborted(Event, frozen=True, kw_only=True):
    """A rank voted abort, or a vote was lost: nothing became visible."""

    event_name: ClassVar = "snapshot.aborted"
    step: int
    generation: int
    reason: str


class SnapshotFailed(Event, frozen=True, kw_only=True):
    """A rank could not stage or write its part. Training goes on."""

    event_name: ClassVar = "snapshot.failed"
    step: int
    generation: int
    rank: int = -1
    reason: str


class SnapshotRejected(Event, frozen=True, kw_only=True):
    """A snapshot did not verify when it was to be used; the next candidate was tried."""

    event_name: ClassVar = "snapshot.rejected"
    entry: str
    reason: str


class SnapshotFinished(Event, frozen=True, kw_only=True):
    """A keeper finished what rank `rank` had left of a snapshot when it died, or could not decide it. `fate`:
    committed; waiting (for the records of other ranks, which may never come); fenced (the lineage had passed it);
    aborted."""

    event_name: ClassVar = "snapshot.finished"
    step: int
    generation: int
    rank: int
    fate: Literal["committed", "waiting", "fenced", "aborted"]
    reason: str = ""


class KeeperMissing(Event, frozen=True, kw_only=True):
    """No keeper could be had, or the keeper died; this rank writes its snapshots itself until there is one."""

    event_name: ClassVar = "keeper.missing"
    rank: int
    reason: str


class KeeperRefused(Event, frozen=True, kw_only=True):
    """A process sent the keeper what it must not, and lost its connection."""

    event_name: ClassVar = "keeper.refused"
    pid: int
    reason: str


class SnapshotRolledBack(Event, frozen=True, kw_only=True):
    """Somebody asked that the next start resumes from `entry` (`autoglm ckpt rollback`). What is newer is kept, outside
    of the lineage."""

    event_name: ClassVar = "snapshot.rolled_back"
    entry: str
    step: int
    generation: int
    """Of the record that says so."""
    head_before: str = ""


class SnapshotsRemoved(Event, frozen=True, kw_only=True):
    """Garbage collection. `entries`: snapshots that the retention gave up (only the first few are named, `count` counts
    all); `files`, `nbytes`: what was deleted in this pass; the packs of a snapshot go a grace later than its entry."""

    event_name: ClassVar = "snapshot.removed"
    entries: list[str] = []
    count: int = 0
    files: int = 0
    nbytes: int = 0


class CleanupFailed(Event, frozen=True, kw_only=True):
    """Garbage collection after a snapshot failed; it is tried again after the next one."""

    event_name: ClassVar = "snapshot.cleanup_failed"
    reason: str


class PlanDecided(Event, frozen=True, kw_only=True):
    """What a recovery resumes from and why (`core.recovery.Plan`)."""

    event_name: ClassVar = "plan.decided"
    generation: int
    tier: str
    step: int
    source_rank: int | None = None
    reason: str = ""
    rejected: list[str] = []


class BudgetCharged(Event, frozen=True, kw_only=True):
    """A failure was charged to the restart budget. `used` of `allowed` since the last progress."""

    event_name: ClassVar = "budget.charged"
    used: int
    allowed: int
    step: int = -1
    first_failure: str = ""


class FallbackSpawn(Event, frozen=True, kw_only=True):
    """Workers are started as fresh interpreters, because fork would not be safe."""

    event_name: ClassVar = "agent.fallback_spawn"
    node: str
    reason: str


class ZygoteLost(Event, frozen=True, kw_only=True):
    """The zygote died; later workers are started as fresh interpreters."""

    event_name: ClassVar = "zygote.lost"
    node: str
    reason: str = ""


class FaultInjected(Event, frozen=True, kw_only=True):
    """The demo, a benchmark or a test broke something on purpose, just now. Gives a report the time of the
    fault."""

    event_name: ClassVar = "fault.injected"
    target: str
    pid: int = 0
    signal: int = 0


class LogFault(Event, frozen=True, kw_only=True):
    """Somebody tried to log an event that is not in this file."""

    event_name: ClassVar = "log.fault"
    name: str
    problem: str


EVENTS: Final[dict[str, type[Event]]] = {cls.event_name: cls for cls in Event.__subclasses__()}
"""Every event by name."""


class EventRecord(msgspec.Struct, frozen=True):
    """One line of the log. `source`: the node, or node and rank, that it is from. `wall_time`: seconds since
    the epoch."""

    wall_time: float
    source: str
    name: str
    fields: dict[str, Any]

    def event(self) -> Event | None:
        """The typed event, or None for a name or fields that this version does not know."""
        cls = EVENTS.get(self.name)
        if cls is None:
            return None
        try:
            return msgspec.convert(self.fields, cls)
        except msgspec.ValidationError:
            return None


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[EventRecord] = msgspec.json.Decoder(EventRecord)


def make(name: str, fields: Mapping[str, object]) -> Event:
    """The typed event of a `wire.Event`. An event that is not listed becomes a `LogFault` that tells what is
    wrong."""
    cls = EVENTS.get(name)
    if cls is None:
        return LogFault(name=name, problem="no such event")
    try:
        return msgspec.convert(dict(fields), cls)
    except msgspec.ValidationError as error:
        return LogFault(name=name, problem=str(error))


def encode_line(record: EventRecord) -> bytes:
    """The line with its newline, cut to `LINE_BYTES_MAX`. Raises ValueError when it does not fit, even
    cut."""
    data = _encoder.encode(record)
    if len(data) >= LINE_BYTES_MAX:
        cut = {key: _cut(value) for key, value in record.fields.items()}
        data = _encoder.encode(msgspec.structs.replace(record, fields=cut))
        if len(data) >= LINE_BYTES_MAX:
            raise ValueError(f"event {record.name} of {len(data)} bytes; at most {LINE_BYTES_MAX}")
    return data + b"\n"


def _cut(value: object) -> object:
    if isinstance(value, str) and len(value) > _TEXT_CHARS_MAX:
        return value[: _TEXT_CHARS_MAX - 1] + "…"
    if isinstance(value, list):
        return [_cut(item) for item in value[:_LIST_ITEMS_MAX]]
    return value


class EventLog:
    """Appends events to a file; thread safe; never raises.

    Args:
        path: the file; its directory must exist by the first event.
        source: who writes: the node, or "node/rank".
        wall: the clock, for people to read (tests inject one).
    """

    def __init__(
        self, path: str | os.PathLike[str], *, source: str, wall: Callable[[], float] = time.time
    ) -> None:
        self._file = _lines.LineFile(path)
        self._source = source
        self._wall = wall
        self._lock = threading.Lock()
        self.faults = 0
        """Events that could not be written."""

    def emit(self, event: Event, *, source: str | None = None, wall_time: float | None = None) -> None:
        """Append one event. `wall_time` is now unless it happened earlier; `source` unless somebody else
        tells it."""
        try:
            record = EventRecord(
                wall_time=self._wall() if wall_time is None else wall_time,
                source=self._source if source is None else source,
                name=event.event_name,
                fields=msgspec.to_builtins(event),
            )
            line = encode_line(record)
            with self._lock:
                self._file.append(line)
        except (OSError, ValueError, TypeError, msgspec.MsgspecError):
            self.faults += 1

    def emit_named(self, name: str, fields: Mapping[str, object], *, source: str | None = None) -> None:
        """Append an event that came as name and fields (`wire.Event`); one that is not listed is logged as
        `log.fault`."""
        try:
            event = make(name, fields)
        except (TypeError, ValueError):
            self.faults += 1
            return
        if isinstance(event, LogFault):
            self.faults += 1
        self.emit(event, source=source)

    def close(self) -> None:
        """Idempotent. An event after it opens the file again."""
        with self._lock:
            self._file.close()


def parse_line(line: bytes) -> EventRecord | None:
    """The record of one line, or None when it is torn or not one of ours."""
    return _lines.parse(line, _decoder)


def read(path: str | os.PathLike[str]) -> Iterator[EventRecord]:
    """All records in the order of the file. Torn lines and a file that is not there yet are passed over."""
    return _lines.read(path, parse_line)
