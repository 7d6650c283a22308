"""One rank's half of a commit: runs the effects of `core.commit.Participant`; on rank 0 it calls the
coordinator's.

It may touch the run directory and the votes' transport. It must never raise what a snapshot's failure is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import limits, tree
from autoglm_elastic.catalog.decide import Decide, Request
from autoglm_elastic.catalog.failpoints import Failpoints
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.core import commit as core
from autoglm_elastic.core.commit import Snapshot, Verdict, Vote
from autoglm_elastic.errors import ElasticError
from autoglm_elastic.ports import StreamBlobs, Votes, VotesLost
from autoglm_elastic.snapshot.staging import Staging
from autoglm_elastic.snapshot.triggers import Triggers


@dataclass(frozen=True, slots=True)
class SaveResult:
    """`entry`: the committed snapshot's name, None unless `committed`. `reason`: why not, "" if committed."""

    committed: bool
    entry: str | None
    reason: str


class _Ballot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    step: int
    generation: int
    vote: str
    reason: str


class _Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="wanted"):
    """Rank 0 asks these ranks for their structures before it decides."""

    ranks: tuple[int, ...]


class _Ruling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ruling"):
    step: int
    generation: int
    verdict: str
    reason: str
    answered: int
    """See core/triggers.py."""


def _join(head: msgspec.Struct, payload: bytes = b"") -> bytes:
    return msgspec.json.encode(head) + b"\n" + payload


class Commit:
    """One rank's part in one snapshot.

    Args:
        staging: this rank's copy, or why there is none.
        wall: seconds since the epoch, for the catalog.
        triggers: hear of the ruling, once on each rank that has one.
    """

    def __init__(
        self,
        blobs: StreamBlobs,
        catalog: Catalog,
        votes: Votes,
        request: Request,
        staging: Staging | ElasticError,
        *,
        failpoint: Failpoints,
        wall: Callable[[], float],
        triggers: Triggers,
    ) -> None:
        self._blobs, self._catalog, self._votes, self._triggers = blobs, catalog, votes, triggers
        self._request, self._snapshot, self._staging = request, request.snapshot, staging
        self._failpoint, self._wall = failpoint, wall
        self._participant = core.Participant(self._snapshot.generation)
        self._detail = ""
        self._ruling: tuple[Verdict, str] | None = None
        self._ruled = self._peer_lost = False
        self._events: deque[core.ParticipantEvent] = deque()
        self.failed_here = ""
        """Why this rank could not prepare, for its report."""
        self.nbytes = 0
        """Of the whole snapshot; known on rank 0."""

    def run(self) -> SaveResult:
        """Returns when it is decided as far as this rank can tell. Raises only bugs."""
        try:
            released = self._run()
        finally:
            if self._votes.rank == 0 and not self._ruled:
                self._triggers.ruling()
        self._failpoint("decided")
        return self._result(released)

    def _run(self) -> bool:
        """Whether the packs were let go on a ruling, or for want of one."""
        self._events.append(core.Trigger(self._snapshot))
        released = False
        while self._events:
            self._participant, effects = self._participant.step(self._events.popleft())
            for effect in effects:
                match effect:
                    case core.Stage():
                        self._on_stage()
                    case core.WritePacks():
                        self._write_packs()
                    case core.SendVote():
                        self._vote(effect)
                    case core.Discard():
                        self._settled(Verdict.ABORT)
                    case core.Release():
                        self._settled(self._ruling[0] if self._ruling else Verdict.UNKNOWN)
                        released = True
        return released

    def _on_stage(self) -> None:
        if isinstance(self._staging, ElasticError):
            self._fail(str(self._staging))
        else:
            self._events.append(core.Staged(self._snapshot))

    def _settled(self, verdict: Verdict) -> None:
        if isinstance(self._staging, Staging):
            self._staging.settled(verdict)

    def _fail(self, reason: str) -> None:
        self.failed_here = reason
        if isinstance(self._staging, Staging):
            self._staging.give_up(reason)
        self._events.append(core.Written(self._snapshot, False, reason=reason))

    def _write_packs(self) -> None:
        if isinstance(self._staging, ElasticError):
            raise self._staging
        try:
            prepared = fmt.encode(self._staging.prepared(limits.VOTE_S))
            if self._votes.rank == 0 and self._snapshot.entry in self._catalog.names():
                self._fail(f"snapshot {self._snapshot.entry} is already in the catalog")
                return
        except ElasticError as error:
            self._fail(str(error))
            return
        except Exception as error:  # noqa: BLE001 - whatever fails here is an abort, or the others would wait for us
            self._fail(f"{type(error).__name__}: {error}")
            return
        self._failpoint("packs_written")
        self._events.append(core.Written(self._snapshot, True, prepared))

    def _vote(self, effect: core.SendVote) -> None:
        snapshot = self._snapshot
        head = _Ballot(snapshot.step, snapshot.generation, effect.vote.value, effect.reason)
        ballot = _join(head, effect.payload)
        try:
            if self._votes.rank == 0:
                self._coordinate(ballot)
                if self._ruling is not None:
                    self._events.append(core.Decision(snapshot, *self._ruling))
                return
            self._votes.gather(ballot)
            self._failpoint("vote_sent")
            ruling = self._await_ruling()
            self._triggers.ruled(ruling.answered)
            theirs = Snapshot(ruling.step, ruling.generation)
            if theirs == snapshot:
                self._ruling = (Verdict(ruling.verdict), ruling.reason)
                self._events.append(core.Decision(snapshot, *self._ruling))
            else:
                self._detail = f"rank 0 ruled on {theirs.entry} instead"
                self._events.append(core.PeerLost(self._detail))
        except (VotesLost, msgspec.MsgspecError, ValueError) as error:
            self._detail = str(error)
            self._events.append(core.PeerLost(str(error)))

    def _await_ruling(self) -> _Ruling:
        """The ruling, after giving this rank's structure if rank 0 wants it. Raises VotesLost."""
        message = msgspec.json.decode(self._votes.broadcast(None), type=_Ruling | _Wanted)
        if isinstance(message, _Wanted):
            answer = b""
            if self._votes.rank in message.ranks and isinstance(self._staging, Staging):
                answer = fmt.encode(self._staging.structure())
            self._votes.gather(answer)
            message = msgspec.json.decode(self._votes.broadcast(None), type=_Ruling)
        return message

    def _structures(self, heard: list[core.VoteFrom]) -> dict[str, fmt.Structure]:
        """By digest, of all ranks that are prepared; asks those that know another one than we. Raises
        VotesLost."""
        votes = {
            vote.rank: fmt.decode(vote.payload, fmt.Prepared, f"the vote of rank {vote.rank}")
            for vote in heard
            if vote.vote is Vote.PREPARED
        }
        known = {}
        if isinstance(self._staging, Staging):
            known[self._staging.digest] = self._staging.structure()
        missing: dict[str, int] = {}
        for rank in sorted(votes):
            if votes[rank].structure not in known:
                missing.setdefault(votes[rank].structure, rank)
        if missing and len(votes) == self._votes.world_size:
            wanted = tuple(missing.values())
            self._votes.broadcast(msgspec.json.encode(_Wanted(wanted)))
            answers = self._votes.gather(b"") or []
            for rank in wanted:
                where = f"the structure of rank {rank}"
                structure = fmt.decode(answers[rank], fmt.Structure, where)
                tree.check(structure.tree, structure.tensors, where)
                known[votes[rank].structure] = structure
        return known

    def _coordinate(self, own: bytes) -> None:
        heard: list[core.VoteFrom | core.PeerLost]
        structures: dict[str, fmt.Structure] = {}
        try:
            ballots = self._votes.gather(own) or []
            self._failpoint("votes_gathered")
            votes = [self._ballot(rank, ballot) for rank, ballot in enumerate(ballots)]
            structures = self._structures(votes)
            heard = [*votes]
        except VotesLost as error:
            # Whoever is lost may have been prepared: then the keepers can still commit it without us.
            self._peer_lost = not self.failed_here
            heard = [core.PeerLost(str(error))]
        except (ElasticError, msgspec.MsgspecError, ValueError) as error:
            heard = [core.PeerLost(str(error))]
        decide = Decide(
            self._blobs,
            self._catalog,
            self._request,
            announce=self._announce,
            failpoint=self._failpoint,
            wall=self._wall,
        )
        decide.run(self._votes.world_size, heard, structures)
        self.nbytes = decide.nbytes

    def _ballot(self, rank: int, ballot: bytes) -> core.VoteFrom:
        head, _, payload = ballot.partition(b"\n")
        vote = msgspec.json.decode(head, type=_Ballot)
        return core.VoteFrom(
            rank, Snapshot(vote.step, vote.generation), Vote(vote.vote), payload, vote.reason
        )

    def _announce(self, verdict: Verdict, reason: str) -> None:
        if verdict is Verdict.ABORT and self._peer_lost:
            verdict = Verdict.UNKNOWN
        self._ruling = (verdict, reason)
        answered, self._ruled = self._triggers.ruling(), True
        ruling = _Ruling(self._snapshot.step, self._snapshot.generation, verdict.value, reason, answered)
        try:
            self._votes.broadcast(msgspec.json.encode(ruling))
        except VotesLost as error:
            self._detail = str(error)

    def _result(self, released: bool) -> SaveResult:
        """A ruling, or what reading settles: a rank that voted and heard nothing looks whether the entry is
        there."""
        verdict, reason = self._ruling or (Verdict.UNKNOWN, self._detail or self.failed_here)
        if verdict is Verdict.UNKNOWN and released:
            try:
                if self._snapshot.entry in self._catalog.names():
                    verdict = Verdict.COMMIT
            except ElasticError as error:
                reason = f"{reason}; {error}"
        if verdict is Verdict.COMMIT:
            return SaveResult(True, self._snapshot.entry, "")
        return SaveResult(False, None, reason or self.failed_here or "undecided")
