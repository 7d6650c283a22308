"""Snapshots of the running job: when they are due, their two-phase commit's votes, what came of them.

Staging happens at the agreed boundary on the training thread, everything else on the manager's threads. A
snapshot that fails is an event; training goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Final

from autoglm_elastic.core.commit import CoalescingTrigger
from autoglm_elastic.core.lineage import EntryFact, GenerationRecord
from autoglm_elastic.errors import CorruptSnapshot, ElasticError, PlatformError, UsageError
from autoglm_elastic.ports import Outcome, Votes, VotesLost
from autoglm_elastic.settings import Settings
from autoglm_elastic.training.agreement import Interval, Stored, write_records
from autoglm_elastic.training.outcomes import WorldChanged

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from autoglm_elastic.snapshot import CheckpointManager, Line

OURS: Final = "autoglm"
"""The key beside the tracked names in a snapshot: seed, cursors, layouts."""

PREVIOUS_LIMIT_S: Final = 60.0
"""Rank 0 begins a snapshot only after it decided the one before; the others hear of that decision at once."""

SETTLE_LIMIT_S: Final = 120.0
"""A recovery that needs the disk waits so long for the keepers to finish what dead workers had staged; then it
takes what is there."""

RECORD_LIMIT_S: Final = 1.0
"""So long a recovery from live state, and later each snapshot, waits for a lineage record to be taken; after that
it is written beside training."""

Emit = Callable[[str, dict[str, Any]], None]


class LateVotes:
    """`ports.Votes` over a gloo group that is built at the first snapshot, on the training thread of every
    rank."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._votes: Votes | None = None

    @property
    def bound(self) -> bool:
        return self._votes is not None

    def bind(self, group: Any) -> None:
        from autoglm_elastic.snapshot import GroupVotes

        self._votes = GroupVotes(group)

    def gather(self, payload: bytes) -> list[bytes] | None:
        return self._there().gather(payload)

    def broadcast(self, payload: bytes | None) -> bytes:
        return self._there().broadcast(payload)

    def swap(self, out: memoryview, to: int, into: memoryview, source: int, *, timeout_s: float) -> None:
        self._there().swap(out, to, into, source, timeout_s=timeout_s)

    def channel(self, number: int) -> Votes:
        return self._there().channel(number)

    def leave(self) -> None:
        if self._votes is not None:
            self._votes.leave()

    def _there(self) -> Votes:
        if self._votes is None:
            raise VotesLost("the ranks have not met yet")
        return self._votes


class SnapshotRequest:
    """What `job.snapshot()` returns. The snapshot is taken at a boundary that the ranks agree on."""

    def __init__(self) -> None:
        self._handle: Any = None

    def begun(self, handle: Any) -> None:
        self._handle = handle

    def done(self) -> bool:
        """Decided: committed or failed. False as long as it was not taken."""
        return self._handle is not None and bool(self._handle.done())

    def wait(self, limit_s: float) -> bool:
        """True when it is committed within `limit_s`; False at once when the boundary was not reached yet."""
        return self._handle is not None and bool(self._handle.wait(limit_s).committed)


class _Unrecorded:
    """Staged in place of a state, makes this rank vote against the snapshot."""

    def __init__(self, generation: int) -> None:
        self._generation = generation

    def to_state(self) -> Any:
        raise PlatformError(f"the record of generation {self._generation} is not written yet")


def _beside(call: Callable[[], Outcome]) -> Future[Outcome]:
    """In a thread that nothing waits for at the end, however long a store is silent."""
    future: Future[Outcome] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except (ElasticError, OSError) as error:
            future.set_exception(error)

    threading.Thread(target=work, name="autoglm-record", daemon=True).start()
    return future


class Snapshots(Stored):
    """One generation's access to the run directory.

    Args:
        line: to the run directory and its keeper.
        votes_group: builds the group for the votes; called at the first snapshot, on all ranks.
        emit: the event log.
    """

    def __init__(
        self,
        line: Line,
        *,
        generation: int,
        rank: int,
        world_size: int,
        settings: Settings,
        votes_group: Callable[[], Any],
        emit: Emit,
    ) -> None:
        from autoglm_elastic.snapshot import CheckpointManager, SingleVotes

        self._votes = LateVotes(rank, world_size)
        self._votes_group = votes_group
        self._line = line
        self.manager: CheckpointManager = CheckpointManager(
            line.blobs,
            line=line,
            generation=generation,
            votes=self._votes if world_size > 1 else SingleVotes(),
            on_event=emit,
            retention=settings.snapshot.retention(),
            grace_s=settings.snapshot.gc_grace_s,
        )
        self._rank, self._generation = rank, generation
        self._emit = emit
        self._interval_steps = settings.snapshot.interval_steps
        self._interval_s = settings.snapshot.interval_s
        self._asked_at = 0.0
        self._asked_step = 0
        self._entered = False
        self._trigger = CoalescingTrigger()
        self._due = False
        """A snapshot is to begin at the next boundary that all ranks agree on."""
        self._handle: Any = None
        self._begun_step = -1
        self.committed_step = -1
        self._owed: list[GenerationRecord] = []
        self._putting: tuple[GenerationRecord, Future[Outcome]] | None = None
        self._broken = False
        self._interrupted = False
        self._enough = threading.Event()
        """Ends the wait under way."""

    # What the agreement needs.

    def entries(self) -> list[EntryFact]:
        return [EntryFact(entry.name, entry.step, entry.generation) for entry in self.manager.entries()]

    def records(self) -> list[GenerationRecord]:
        return list(self.manager.records())

    def verify(self, entry: str, part: int, parts: int) -> str:
        try:
            problems = self.manager.verify(entry, part=(part, parts), on_bytes=self._go_on)
        except ElasticError as error:
            return str(error)
        return str(problems[0]) if problems else ""

    def _go_on(self, _: int) -> None:
        """Nobody reads on for a generation that is broken."""
        if self._broken:
            raise WorldChanged(self._generation, "the generation broke while a snapshot was checked")

    def open(self, entry: str) -> Mapping[str, Any]:
        state: dict[str, Any] = {OURS: {}}
        self.manager.load(state, entry=entry, strict=False)
        ours = state[OURS]
        if not isinstance(ours, dict) or not {"job", "layouts"} <= set(ours):
            raise CorruptSnapshot(f"snapshot {entry} was not written by elastic.run")
        return ours

    def settle(self) -> None:
        self._line.settle(SETTLE_LIMIT_S)

    def put_generation(self, record: GenerationRecord, *, patient: bool) -> Outcome:
        if patient:
            return self.manager.put_generation(record)
        if self._putting is None or self._putting[0] != record:
            self._putting = (record, _beside(lambda: self.manager.put_generation(record)))
        future = self._putting[1]
        if not wait([future], RECORD_LIMIT_S).done:
            raise PlatformError(f"no answer within {RECORD_LIMIT_S:g} s")
        self._putting = None
        return future.result(0)

    def owing(self, record: GenerationRecord, reason: str) -> None:
        self._emit("generation.unrecorded", {"generation": record.number, "reason": reason})

    def reject(self, entry: str, reason: str) -> None:
        self._emit("snapshot.rejected", {"entry": entry, "reason": reason})

    # What the running job needs.

    def resumed_at(self, step: int, unwritten: Iterable[GenerationRecord], interval: Interval) -> None:
        """Where the generation begins: steps count from there, and seconds from where they did. `unwritten`:
        records that must be on disk before a snapshot can be."""
        self._asked_step = step
        self._asked_at = time.monotonic() - interval.since_s
        self._owed = list(unwritten)
        if self._rank == 0 and interval.interrupted:
            self._trigger, self._due = self._trigger.request()
        self._entered = True

    def interval(self, before: Interval) -> Interval:
        """For the next generation, after the end of this one. `before`: what was handed to this one."""
        if not self._entered:
            return before
        self.collect()
        given_up = self._interrupted and self.committed_step != self._begun_step
        return Interval(time.monotonic() - self._asked_at, self._due or given_up or self._handle is not None)

    def loader(self, entry: str) -> Callable[[dict[str, Any]], None]:
        def load(state: dict[str, Any]) -> None:
            together = self._line.blobs.remote and self._votes.world_size > 1
            if together:
                self._meet()
            report = self.manager.load(state, entry=entry, strict=False, together=together)
            if report.missing:
                raise UsageError(f"snapshot {entry} has no {', '.join(report.missing[:5])}")

        return load

    def _meet(self) -> None:
        """All ranks call it, at the same place."""
        if self._votes.world_size > 1 and not self._votes.bound:
            self._votes.bind(self._votes_group())

    def due(self, boundary: int) -> bool:
        """Rank 0's decision; the others follow it. Never while one is under way: what falls due meanwhile
        becomes one more as soon as that is decided."""
        if self._rank != 0:
            return False
        self.collect()
        every = self._interval_steps
        by_steps = every > 0 and boundary // every > self._asked_step // every
        by_time = self._interval_s > 0 and time.monotonic() - self._asked_at >= self._interval_s
        if by_steps or by_time:
            self._asked_step, self._asked_at = boundary, time.monotonic()
            self._trigger, start = self._trigger.request()
            self._due = self._due or start
            if not start:
                self.manager.coalesced()
        return self._due and self._handle is None

    @property
    def newest_begun(self) -> int:
        """The step of the newest snapshot begun here, -1 for none."""
        return self._begun_step

    @property
    def busy(self) -> bool:
        self.collect()
        return self._handle is not None

    def begin(
        self,
        step: int,
        state: dict[str, Any],
        metrics: Mapping[str, Any],
        optimizers: Sequence[Optimizer] = (),
        *,
        last: bool = False,
    ) -> Any:
        """Stage the state of this boundary; all ranks call it at the same one. None when it could not even
        begin.

        Args:
            optimizers: what they own may be copied until one of them steps.
            last: no step follows.

        Raises:
            torch.distributed.DistError, RuntimeError: not all ranks are there any more.
        """
        self._asked_step, self._asked_at = step, time.monotonic()
        self._meet()
        try:
            self.wait(PREVIOUS_LIMIT_S)
            if self._rank == 0 and self._owed:
                self._owed = write_records(self, self._owed)
                if self._owed:
                    state = {OURS: _Unrecorded(self._owed[0].number)}
            if not self._trigger.in_flight:
                self._trigger, _ = self._trigger.request()
            self._due = False
            self._handle = self.manager.save(
                step, state, optimizers=optimizers, metrics=dict(metrics), agreed=True, patient=last
            )
            self._begun_step = step
        except (ElasticError, OSError, RuntimeError) as error:
            # What was committed before is not this one, nor what may still be under way.
            self._handle, self._begun_step = None, step
            self._settled()
            self._emit("snapshot.failed", self._failure(step, str(error)))
            return None
        return self._handle

    def wait(self, limit_s: float) -> bool:
        """True when the newest snapshot begun here is committed. False after `limit_s`, and as soon as the
        generation breaks: nobody waits for a disk when a peer is lost."""
        handle = self._handle
        if handle is not None and not handle.done():
            self._enough = enough = threading.Event()

            def watch() -> None:
                handle.wait(limit_s)
                enough.set()

            threading.Thread(target=watch, name="autoglm-snapshot-wait", daemon=True).start()
            if not self._broken:
                enough.wait(limit_s)
        self.collect()
        return self._handle is None and self._begun_step >= 0 and self.committed_step == self._begun_step

    def broken(self) -> None:
        """From any thread: the generation is broken, nobody is to wait for a snapshot any more."""
        self._broken = True
        self._enough.set()
        self._interrupted = self._handle is not None

    def collect(self) -> None:
        """Note what became of the snapshot under way, if it is decided."""
        handle = self._handle
        if handle is None or not handle.done():
            return
        self._handle = None
        self._settled()
        if handle.wait(0).committed:
            self.committed_step = self._begun_step

    def _settled(self) -> None:
        self._trigger, again = self._trigger.settled()
        self._due = self._due or again

    def close(self) -> None:
        """Leave: whoever still writes is left behind; its votes are lost, so nothing can come of it."""
        self.manager.close(0.0)

    def _failure(self, step: int, reason: str) -> dict[str, Any]:
        return {"step": step, "generation": self._generation, "rank": self._rank, "reason": reason}
