"""The two-phase commit of a snapshot: one coordinator (rank 0), one participant a rank. Presumed abort.

The commit is one atomic move, the catalog entry put if absent. Before it: every rank's packs are durable and
voted for, and the manifest is durable. After it: hints, that a reader does not need. So a coordinator that
dies between any two effects leaves the old recovery point or the new one, and what was never entered never
happened.

`UNKNOWN` for the entry is settled by reading; if it is absent it is put again, because the first request may
still be on its way: only an entry that was never asked for is announced as aborted. What cannot be settled is
announced as `UNKNOWN`, and the participants keep their packs.

Packs may be collected once a prepare has become too old (the caller's bound and clock). So a prepare that is too old
when the manifest is durable is aborted; and since the caller may be stopped between that look and the put, it looks
again when the entry is known to be there. One that came too late is taken back. What was asked for is announced as
`UNKNOWN` then, too.

The caller feeds `Timeout` after a bound of its own in every phase; no phase waits for ever. Every event and
effect names its snapshot; one that names another is ignored.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Final

from autoglm_elastic.core.lineage import entry_name
from autoglm_elastic.core.outcome import Outcome

SETTLE_ATTEMPTS_MAX: Final = 3
"""How often an entry is put, or read, until its fate is called unknown."""
TOO_OLD: Final = "its first pack was durable too long ago: garbage collection may have taken it"
NO_AGE: Final = "it could not be told how long ago its first pack was durable"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of the job at one step boundary, as one generation cuts it."""

    step: int
    generation: int

    @property
    def entry(self) -> str:
        return entry_name(self.step, self.generation)


class Vote(enum.Enum):
    PREPARED = "prepared"
    ABORT = "abort"


class Verdict(enum.Enum):
    """`UNKNOWN`: the entry may or may not be there; keep the packs, the catalog tells."""

    COMMIT = "commit"
    ABORT = "abort"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Trigger:
    """A snapshot of this boundary is to be made. For the coordinator and for every participant."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Staged:
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Written:
    """The packs of this rank are durable under their final names (`ok`), or are not and never will be."""

    snapshot: Snapshot
    ok: bool
    vote_payload: bytes = b""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    snapshot: Snapshot
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A rank died or is out of reach: no vote or decision can be expected any more."""

    reason: str = "a rank was lost"


@dataclass(frozen=True, slots=True)
class VoteFrom:
    rank: int
    snapshot: Snapshot
    vote: Vote
    payload: bytes = b""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ManifestWritten:
    """CONFLICT: a manifest of this name is there; names are digests, so it is the same one. `late`: the prepare is too
    old by now. None: that cannot be told."""

    snapshot: Snapshot
    outcome: Outcome
    late: bool | None = False


@dataclass(frozen=True, slots=True)
class EntryPut:
    """`late`: as of ManifestWritten, found out after the put; counts for OK only."""

    snapshot: Snapshot
    outcome: Outcome
    late: bool | None = False


@dataclass(frozen=True, slots=True)
class EntryRead:
    """`present`: the entry is there and names our manifest. None: it could not be read. `late`: as of ManifestWritten,
    found out after the reading; counts when it is present only."""

    snapshot: Snapshot
    present: bool | None
    late: bool | None = False


@dataclass(frozen=True, slots=True)
class HintsMoved:
    snapshot: Snapshot
    ok: bool


@dataclass(frozen=True, slots=True)
class Timeout:
    """What this phase waits for did not come within the caller's bound."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Stage:
    """Copy this boundary's state; answer `Staged`, or `Written(ok=False)`."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class WritePacks:
    """Write, hash, fsync, rename; answer `Written`."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class SendVote:
    snapshot: Snapshot
    vote: Vote
    payload: bytes = b""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Discard:
    """The snapshot does not exist and never will: its packs are garbage, its staged copy is free."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Release:
    """The staged copy is free. The packs stay: they are committed, or the catalog will tell."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class WriteManifest:
    """`payloads` by rank."""

    snapshot: Snapshot
    payloads: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class PutEntry:
    """The commit: put the catalog entry if absent; answer `EntryPut`."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class ReadEntry:
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class TakeBack:
    """The entry came too late: remove it, if it is ours. A failure changes nothing; no answer is expected."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class MoveHints:
    """HEAD and `latest`; answer `HintsMoved`. A failure changes nothing."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Announce:
    snapshot: Snapshot
    verdict: Verdict
    reason: str = ""


ParticipantEvent = Trigger | Staged | Written | Decision | PeerLost
ParticipantEffect = Stage | WritePacks | SendVote | Discard | Release
CoordinatorEvent = (
    Trigger | VoteFrom | PeerLost | ManifestWritten | EntryPut | EntryRead | HintsMoved | Timeout
)  # fmt: skip
CoordinatorEffect = WriteManifest | PutEntry | ReadEntry | TakeBack | MoveHints | Announce


class ParticipantPhase(enum.Enum):
    IDLE = "idle"
    STAGING = "staging"
    WRITING = "writing"
    VOTED = "voted"


@dataclass(frozen=True, slots=True)
class Participant:
    """One rank's part, for one generation. Holds at most one snapshot."""

    generation: int
    phase: ParticipantPhase = ParticipantPhase.IDLE
    snapshot: Snapshot | None = None

    def step(self, event: ParticipantEvent) -> tuple[Participant, tuple[ParticipantEffect, ...]]:
        if isinstance(event, Trigger):
            return self._trigger(event.snapshot)
        if self.snapshot is None or (not isinstance(event, PeerLost) and event.snapshot != self.snapshot):
            return self, ()
        snapshot = self.snapshot
        match event, self.phase:
            case Staged(), ParticipantPhase.STAGING:
                return replace(self, phase=ParticipantPhase.WRITING), (WritePacks(snapshot),)
            case Written(ok=True), ParticipantPhase.WRITING:
                vote = SendVote(snapshot, Vote.PREPARED, event.vote_payload)
                return replace(self, phase=ParticipantPhase.VOTED), (vote,)
            case Written(ok=False), ParticipantPhase.STAGING | ParticipantPhase.WRITING:
                abort = SendVote(snapshot, Vote.ABORT, reason=event.reason)
                return self._idle(), (abort, Discard(snapshot))
            case Decision(verdict=Verdict.ABORT), _:
                return self._idle(), (Discard(snapshot),)
            case Decision(), ParticipantPhase.VOTED:
                return self._idle(), (Release(snapshot),)
            case PeerLost(), _:
                return self._idle(), (self._leave(snapshot),)
        return self, ()

    def _trigger(self, snapshot: Snapshot) -> tuple[Participant, tuple[ParticipantEffect, ...]]:
        if snapshot.generation != self.generation:
            return self, ()
        if self.snapshot is None:
            return Participant(self.generation, ParticipantPhase.STAGING, snapshot), (Stage(snapshot),)
        if snapshot.step <= self.snapshot.step:
            return self, ()
        # The coordinator went on, so it has given up or decided the older one without our hearing of it.
        next_ = Participant(self.generation, ParticipantPhase.STAGING, snapshot)
        return next_, (self._leave(self.snapshot), Stage(snapshot))

    def _leave(self, snapshot: Snapshot) -> Discard | Release:
        """Without our vote it cannot have been committed; with it, only the catalog knows."""
        return Release(snapshot) if self.phase is ParticipantPhase.VOTED else Discard(snapshot)

    def _idle(self) -> Participant:
        return Participant(self.generation)


class CoordinatorPhase(enum.Enum):
    IDLE = "idle"
    COLLECTING = "collecting"
    MANIFEST = "manifest"
    PUTTING = "putting"
    READING = "reading"
    HINTS = "hints"


@dataclass(frozen=True, slots=True)
class Coordinator:
    """The decider, for one generation. One snapshot at a time; a trigger while it is busy is ignored.

    `votes` are the prepared ranks' payloads, sorted by rank. `attempts` counts puts and reads of the entry.
    """

    generation: int
    world_size: int
    phase: CoordinatorPhase = CoordinatorPhase.IDLE
    snapshot: Snapshot | None = None
    votes: tuple[tuple[int, bytes], ...] = ()
    attempts: int = 0

    def step(self, event: CoordinatorEvent) -> tuple[Coordinator, tuple[CoordinatorEffect, ...]]:
        if isinstance(event, Trigger):
            if self.snapshot is not None or event.snapshot.generation != self.generation:
                return self, ()
            return replace(self, phase=CoordinatorPhase.COLLECTING, snapshot=event.snapshot), ()
        if self.snapshot is None or (not isinstance(event, PeerLost) and event.snapshot != self.snapshot):
            return self, ()
        match event, self.phase:
            case VoteFrom(), CoordinatorPhase.COLLECTING:
                return self._vote(self.snapshot, event)
            case PeerLost(), CoordinatorPhase.COLLECTING:
                return self._announce(Verdict.ABORT, event.reason)
            case ManifestWritten(), CoordinatorPhase.MANIFEST:
                if event.outcome is Outcome.UNKNOWN:
                    return self._announce(Verdict.ABORT, "the manifest was not confirmed to be durable")
                if event.late is not False:
                    return self._announce(Verdict.ABORT, TOO_OLD if event.late else NO_AGE)
                return self._put(self.snapshot)
            case EntryPut(outcome=Outcome.OK), CoordinatorPhase.PUTTING:
                return self._there(self.snapshot, event.late)
            case EntryPut(), CoordinatorPhase.PUTTING:
                return self._read(self.snapshot, conflict=event.outcome is Outcome.CONFLICT)
            case EntryRead(present=True), CoordinatorPhase.READING:
                return self._there(self.snapshot, event.late)
            case EntryRead(present=False), CoordinatorPhase.READING:
                return self._put(self.snapshot)
            case EntryRead(), CoordinatorPhase.READING:
                return self._read(self.snapshot)
            case HintsMoved(), CoordinatorPhase.HINTS:
                return self._idle(), ()
            case Timeout(), _:
                return self._timeout(self.snapshot)
        return self, ()

    def _vote(self, snapshot: Snapshot, event: VoteFrom) -> tuple[Coordinator, tuple[CoordinatorEffect, ...]]:
        known = dict(self.votes)
        if not 0 <= event.rank < self.world_size or event.rank in known:
            return self, ()
        if event.vote is Vote.ABORT:
            return self._announce(Verdict.ABORT, f"rank {event.rank}: {event.reason}")
        known[event.rank] = event.payload
        votes = tuple(sorted(known.items()))
        if not self._all_prepared(votes):
            return replace(self, votes=votes), ()
        manifest = WriteManifest(snapshot, tuple(payload for _, payload in votes))
        return replace(self, phase=CoordinatorPhase.MANIFEST, votes=votes), (manifest,)

    def _all_prepared(self, votes: tuple[tuple[int, bytes], ...]) -> bool:
        """The one condition of a commit: every rank has voted, and only prepared votes are kept."""
        return len(votes) == self.world_size

    def _put(self, snapshot: Snapshot) -> tuple[Coordinator, tuple[CoordinatorEffect, ...]]:
        if self.attempts >= SETTLE_ATTEMPTS_MAX:
            return self._announce(Verdict.UNKNOWN, "the catalog entry was not confirmed")
        return (
            replace(self, phase=CoordinatorPhase.PUTTING, attempts=self.attempts + 1),
            (PutEntry(snapshot),),
        )

    def _read(
        self, snapshot: Snapshot, *, conflict: bool = False
    ) -> tuple[Coordinator, tuple[CoordinatorEffect, ...]]:
        if self.attempts >= SETTLE_ATTEMPTS_MAX and not conflict:
            return self._announce(Verdict.UNKNOWN, "the catalog entry could not be read")
        return (
            replace(self, phase=CoordinatorPhase.READING, attempts=self.attempts + 1),
            (ReadEntry(snapshot),),
        )

    def _there(
        self, snapshot: Snapshot, late: bool | None
    ) -> tuple[Coordinator, tuple[CoordinatorEffect, ...]]:
        if late is None:
            return self._announce(Verdict.UNKNOWN, NO_AGE)
        if late:
            return self._idle(), (TakeBack(snapshot), Announce(snapshot, Verdict.UNKNOWN, TOO_OLD))
        hints = replace(self, phase=CoordinatorPhase.HINTS)
        return hints, (Announce(snapshot, Verdict.COMMIT), MoveHints(snapshot))

    def _timeout(self, snapshot: Snapshot) -> tuple[Coordinator, tuple[CoordinatorEffect, ...]]:
        match self.phase:
            case CoordinatorPhase.COLLECTING:
                known = {rank for rank, _ in self.votes}
                missing = [str(rank) for rank in range(self.world_size) if rank not in known]
                return self._announce(Verdict.ABORT, f"no vote in time from rank {', '.join(missing)}")
            case CoordinatorPhase.MANIFEST:
                return self._announce(Verdict.ABORT, "the manifest was not written in time")
            case CoordinatorPhase.PUTTING | CoordinatorPhase.READING:
                return self._read(snapshot)
        return self._idle(), ()

    def _announce(self, verdict: Verdict, reason: str) -> tuple[Coordinator, tuple[CoordinatorEffect, ...]]:
        if self.snapshot is None:
            return self, ()
        return self._idle(), (Announce(self.snapshot, verdict, reason),)

    def _idle(self) -> Coordinator:
        return type(self)(self.generation, self.world_size)


@dataclass(frozen=True, slots=True)
class CoalescingTrigger:
    """One snapshot in flight; what is asked for meanwhile becomes one more, as soon as it is settled."""

    in_flight: bool = False
    pending: bool = False
    coalesced: int = 0

    def request(self) -> tuple[CoalescingTrigger, bool]:
        """A snapshot is asked for. Returns whether to start one now."""
        if not self.in_flight:
            return replace(self, in_flight=True), True
        # The first request that waits will be served; only further ones are swallowed.
        return replace(self, pending=True, coalesced=self.coalesced + self.pending), False

    def settled(self) -> tuple[CoalescingTrigger, bool]:
        """The snapshot in flight was committed or aborted. Returns whether to start one at the next
        boundary."""
        return replace(self, in_flight=self.pending, pending=False), self.pending
