"""The snapshot side of a simulated worker: carries out the effects of `core.commit` for one rank of one
generation.

Votes and decisions are messages that get lost, are repeated and overtake each other. A saver outlives its
generation if its coordinator is past the votes: that is the paused or late coordinator which the lineage
fences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from autoglm_elastic.core import commit
from autoglm_elastic.core.commit import (
    Announce,
    CoalescingTrigger,
    CoordinatorEffect,
    CoordinatorEvent,
    Decision,
    Discard,
    MoveHints,
    ParticipantEffect,
    ParticipantEvent,
    PutEntry,
    ReadEntry,
    Release,
    SendVote,
    Snapshot,
    Stage,
    VoteFrom,
    WriteManifest,
    WritePacks,
)
from autoglm_elastic.core.outcome import Outcome
from autoglm_elastic.sim.disk import Pack, State
from autoglm_elastic.sim.group import Group

if TYPE_CHECKING:
    from autoglm_elastic.sim.worker import Worker


class Saver:
    """One rank's participant and, on rank 0, the coordinator."""

    def __init__(self, worker: Worker, group: Group, rank: int) -> None:
        self._worker, self._group, self._rank = worker, group, rank
        self._loop, self._disk, self._config = worker.sim.loop, worker.sim.disk, worker.sim.config
        core = worker.sim.core
        self._participant = core.participant(group.number)
        self._coordinator = core.coordinator(group.number, group.world_size)
        self._trigger = CoalescingTrigger()
        self._due = False
        self._staged: dict[Snapshot, State] = {}

    def decide(self, step: int) -> bool:
        """On rank 0, before a step: whether its boundary is to be a snapshot."""
        wanted, self._due = self._due, False
        if (step + 1) % self._config.snapshot_every == 0:
            self._trigger, start = self._trigger.request()
            wanted = wanted or start
        if wanted:
            self._coordinate(commit.Trigger(Snapshot(step, self._group.number)))
        return wanted

    def at_boundary(self, step: int) -> None:
        self._take_part(commit.Trigger(Snapshot(step, self._group.number)))

    def peer_lost(self) -> None:
        """The generation is over."""
        self._take_part(commit.PeerLost("the generation is over"))
        self._coordinate(commit.PeerLost("the generation is over"))

    def on_vote(self, vote: VoteFrom) -> None:
        self._coordinate(vote)

    def on_decision(self, decision: Decision) -> None:
        self._take_part(decision)

    def _take_part(self, event: ParticipantEvent) -> None:
        self._participant, effects = self._participant.step(event)
        for effect in effects:
            if not self._worker.may_act():
                return
            self._perform(effect)

    def _perform(self, effect: ParticipantEffect) -> None:
        snapshot = effect.snapshot
        match effect:
            case Stage():
                state = self._worker.state
                if state is None or state.step != snapshot.step:
                    self._take_part(commit.Written(snapshot, False, reason="the boundary has passed"))
                    return
                self._staged[snapshot] = state
                self._loop.soon(
                    self._config.message_s, self._worker, self._take_part, commit.Staged(snapshot)
                )
            case WritePacks():
                self._write(snapshot)
            case SendVote():
                vote = VoteFrom(self._rank, snapshot, effect.vote, effect.payload, effect.reason)
                coordinator = self._group.members[0]
                self._send(coordinator, coordinator.on_vote, self._group, vote)
            case Discard():
                self._staged.pop(snapshot, None)
                self._disk.delete_pack(self._pack_name(snapshot))
            case Release():
                self._staged.pop(snapshot, None)

    def _write(self, snapshot: Snapshot) -> None:
        name = self._pack_name(snapshot)
        pack = Pack(name, snapshot, self._rank, self._group.world_size, self._staged[snapshot])
        if self._loop.chance(self._config.write_failure):
            failed = commit.Written(snapshot, False, reason="No space left on device")
            self._loop.soon(self._config.write_s, self._worker, self._take_part, failed)
        else:
            self._loop.soon(self._config.write_s, self._worker, self._written, pack)

    def _written(self, pack: Pack) -> None:
        """The files are there; the answer is another event, so a crash can come between."""
        if self._worker.may_act():
            self._disk.put_pack(pack)
            done = commit.Written(pack.snapshot, True, pack.name)
            self._loop.soon(self._config.message_s, self._worker, self._take_part, done)

    def _coordinate(self, event: CoordinatorEvent) -> None:
        before = self._coordinator
        self._coordinator, effects = before.step(event)
        after = self._coordinator
        if after.snapshot is not None and (after.phase, after.attempts) != (before.phase, before.attempts):
            self._loop.after(self._config.phase_s, self._worker, self._timeout, after)
        for effect in effects:
            if not self._worker.may_act():
                return
            self._decide(effect)

    def _timeout(self, armed: commit.Coordinator) -> None:
        now = self._coordinator
        if armed.snapshot is not None and (now.snapshot, now.phase, now.attempts) == (
            armed.snapshot,
            armed.phase,
            armed.attempts,
        ):
            self._coordinate(commit.Timeout(armed.snapshot))

    def _decide(self, effect: CoordinatorEffect) -> None:
        snapshot, disk, worker, write_s = effect.snapshot, self._disk, self._worker, self._config.write_s
        match effect:
            case WriteManifest():
                write = partial(disk.put_manifest, snapshot, effect.payloads)
                disk.effect(worker, write_s, write, self._answer(commit.ManifestWritten, snapshot))
            case PutEntry():
                self._loop.trace(f"{worker.name}: put entry {snapshot.entry}")
                disk.effect(
                    worker,
                    write_s,
                    partial(disk.put_entry, snapshot),
                    self._answer(commit.EntryPut, snapshot),
                )
            case ReadEntry():
                self._loop.soon(write_s, worker, self._read_entry, snapshot)
            case MoveHints():
                disk.head = snapshot.entry
                self._loop.trace(f"{worker.name}: HEAD is {snapshot.entry}")
                moved = commit.HintsMoved(snapshot, True)
                self._loop.soon(self._config.message_s, worker, self._coordinate, moved)
            case Announce():
                self._announce(effect)

    def _answer(
        self, kind: type[commit.ManifestWritten] | type[commit.EntryPut], snapshot: Snapshot
    ) -> Callable[[Outcome], None]:
        return lambda outcome: self._coordinate(kind(snapshot, outcome))

    def _read_entry(self, snapshot: Snapshot) -> None:
        present = None if self._loop.chance(self._config.unknown) else snapshot.entry in self._disk.entries
        self._coordinate(commit.EntryRead(snapshot, present))

    def _announce(self, effect: Announce) -> None:
        because = f": {effect.reason}" if effect.reason else ""
        self._loop.trace(f"{self._worker.name}: {effect.snapshot.entry} {effect.verdict.value}{because}")
        self._worker.sim.count(f"snapshot {effect.verdict.value}")
        self._trigger, self._due = self._trigger.settled()
        decision = Decision(effect.snapshot, effect.verdict, effect.reason)
        for worker in list(self._group.members.values()):
            self._send(worker, worker.on_decision, self._group, decision)

    def _send(self, to: Worker, call: Callable[..., None], *args: object) -> None:
        """A message that may be lost or come twice."""
        if not self._loop.chance(self._config.lost_message):
            self._loop.soon(self._config.message_s, to, call, *args)
        if self._loop.chance(self._config.repeated_message):
            self._loop.soon(self._config.message_s * 20, to, call, *args)

    def _pack_name(self, snapshot: Snapshot) -> bytes:
        return f"{snapshot.entry}.{self._rank}".encode()
