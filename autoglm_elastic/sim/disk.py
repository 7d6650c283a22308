"""The run directory of a simulation: records, packs, manifests, the catalog. Durable, shared, slow, and not
always sure.

An effect's request and its answer are two events, so its process can die between them; a request whose answer
is Unknown may have been applied, may never be, or may be applied much later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autoglm_elastic.core.commit import Snapshot
from autoglm_elastic.core.lineage import EntryFact, GenerationRecord
from autoglm_elastic.core.outcome import Outcome
from autoglm_elastic.core.split import Cursor
from autoglm_elastic.sim.loop import Actor, Loop


@dataclass(frozen=True, slots=True)
class State:
    """What a replica (or a shard of one) holds after `step`, as a training would: `digest` stands for the
    tensors, and differs between branches; `samples` for what was seen so far, and does not depend on the
    world. `shard`: (index, parts) of the world that made it."""

    step: int
    generation: int
    digest: int
    samples: int
    cursor: Cursor
    shard: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Pack:
    """One rank's part of a snapshot."""

    name: bytes
    snapshot: Snapshot
    part: int
    parts: int
    state: State


class SimDisk:
    """`changed` is set by everything that could make a visible snapshot wrong; the checker clears it."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.records: dict[int, GenerationRecord] = {}
        self.packs: dict[bytes, Pack] = {}
        self.manifests: dict[Snapshot, tuple[bytes, ...]] = {}
        self.entries: dict[str, Snapshot] = {}
        self.head = ""
        self.writes = 0
        """Blobs put so far: records, packs, manifests, entries."""
        self.changed = False

    def effect(
        self, actor: Actor, mean_s: float, apply: Callable[[], Outcome], then: Callable[[Outcome], None]
    ) -> None:
        """Carry out `apply`, now or later or never, and tell `actor`."""
        loop, config = self._loop, self._loop.config
        if not loop.chance(config.unknown):
            loop.soon(mean_s, None, self._answer, actor, apply, then)
            return
        if loop.chance(0.7):
            late = config.phase_s if loop.chance(0.4) else mean_s
            loop.soon(late, None, self._apply, apply)
        loop.soon(config.retry_s, actor, then, Outcome.UNKNOWN)

    @staticmethod
    def _apply(apply: Callable[[], Outcome]) -> None:
        apply()

    def _answer(self, actor: Actor, apply: Callable[[], Outcome], then: Callable[[Outcome], None]) -> None:
        self._loop.soon(self._loop.config.message_s, actor, then, apply())

    def put_pack(self, pack: Pack) -> Outcome:
        self.writes += 1
        self.packs[pack.name] = pack
        self.changed = True
        return Outcome.OK

    def delete_pack(self, name: bytes) -> None:
        self.packs.pop(name, None)
        self.changed = True

    def put_manifest(self, snapshot: Snapshot, packs: tuple[bytes, ...]) -> Outcome:
        self.writes += 1
        if snapshot in self.manifests:
            return Outcome.CONFLICT
        self.manifests[snapshot] = packs
        self._loop.trace(f"disk: manifest of {snapshot.entry}")
        return Outcome.OK

    def put_entry(self, snapshot: Snapshot) -> Outcome:
        self.writes += 1
        if snapshot.entry in self.entries:
            return Outcome.CONFLICT
        self.entries[snapshot.entry] = snapshot
        self.changed = True
        self._loop.trace(f"disk: entry {snapshot.entry}")
        return Outcome.OK

    def put_record(self, record: GenerationRecord) -> Outcome:
        self.writes += 1
        if record.number in self.records:
            return Outcome.CONFLICT
        self.records[record.number] = record
        self._loop.trace(
            f"disk: record {record.number} extends {record.parent} at step {record.resumed_step}"
        )
        return Outcome.OK

    def facts(self) -> list[EntryFact]:
        return [EntryFact(name, at.step, at.generation) for name, at in self.entries.items()]

    def read(self, name: str) -> list[State] | str:
        """The states of an entry's packs, by part; or what does not verify."""
        snapshot = self.entries.get(name)
        if snapshot is None:
            return f"{name} is not in the catalog"
        names = self.manifests.get(snapshot)
        if names is None:
            return f"{name} has no manifest"
        missing = [pack.decode() for pack in names if pack not in self.packs]
        if missing:
            return f"{name} lacks its pack {missing[0]}"
        return [self.packs[pack].state for pack in names]
