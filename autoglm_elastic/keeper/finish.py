"""A snapshot whose ranks are gone: one durable record a rank, and whoever sees all of them decides.

Any number may decide at once, on any node: the catalog entry is put if absent. An entry that comes late, when a
newer generation has left its step behind, is harmless (core/lineage.py); what the lineage has passed already is
not tried."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import prepared as records
from autoglm_elastic.catalog.decide import Decide
from autoglm_elastic.catalog.failpoints import Failpoints
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.core import lineage
from autoglm_elastic.core.commit import Snapshot, Verdict, Vote, VoteFrom
from autoglm_elastic.core.lineage import EntryFact
from autoglm_elastic.errors import CorruptSnapshot, ElasticError
from autoglm_elastic.ports import StreamBlobs


class Fate(enum.Enum):
    """`WAITING`: not all ranks have prepared, or not yet. `FENCED`: the lineage has passed it."""

    COMMITTED = "committed"
    WAITING = "waiting"
    FENCED = "fenced"
    ABORTED = "aborted"


class Finisher:
    """Finishes snapshots of one run directory. Thread safe; every call is bounded by its file operations."""

    def __init__(self, blobs: StreamBlobs, failpoint: Failpoints, wall: Callable[[], float]) -> None:
        self._blobs, self._failpoint, self._wall = blobs, failpoint, wall
        self._catalog = Catalog(blobs)

    def finish(
        self,
        snapshot: Snapshot,
        rank: int,
        world_size: int,
        prepared: fmt.Prepared,
        details: records.Details,
    ) -> tuple[Fate, str]:
        """The rank's record is durable, and if it was the last one the snapshot is decided. The reason of an
        abort. Raises ElasticError."""
        fate = self._passed(snapshot)
        if fate is None:
            records.put(self._blobs, snapshot, rank, world_size, prepared, details)
            self._failpoint("prepared_put")
            if records.ranks(self._blobs, snapshot.entry) != list(range(world_size)):
                return Fate.WAITING, "the records of other ranks are not there"
            fate, reason = self._decide(snapshot, world_size)
        elif fate is Fate.COMMITTED and not self._catalog.confirm(snapshot.entry):
            return Fate.WAITING, "the entry that another one put was not confirmed to be durable"
        else:
            reason = ""
        if fate is not Fate.ABORTED:
            self.sweep()
        return fate, reason

    def sweep(self) -> None:
        """Removes the records that mean nothing any more: of what is committed, fenced, or older than the newest
        snapshot. Raises ElasticError."""
        newest = self._catalog.newest()
        for snapshot in records.entries(self._blobs):
            if self._passed(snapshot) or (newest is not None and snapshot.step <= newest.step):
                records.remove(self._blobs, snapshot.entry)

    def _passed(self, snapshot: Snapshot) -> Fate | None:
        if snapshot.entry in self._catalog.names():
            return Fate.COMMITTED
        fact = EntryFact(snapshot.entry, snapshot.step, snapshot.generation)
        lines = self._catalog.records()
        return None if not lines or lineage.in_lineage(fact, lines) else Fate.FENCED

    def _decide(self, snapshot: Snapshot, world_size: int) -> tuple[Fate, str]:
        found = [records.read(self._blobs, snapshot, rank) for rank in range(world_size)]
        wish = found[0].wish
        if wish is None or any(record.world_size != world_size for record in found):
            raise CorruptSnapshot(f"the records of {snapshot.entry} contradict each other")
        structures: dict[str, fmt.Structure] = {}
        for record in found:
            if record.prepared.structure not in structures:
                structure = records.read_structure(self._blobs, snapshot.entry, record.structure)
                structures[record.prepared.structure] = structure
        verdicts: list[tuple[Verdict, str]] = []
        decide = Decide(
            self._blobs,
            self._catalog,
            wish.request(snapshot),
            announce=lambda verdict, reason: verdicts.append((verdict, reason)),
            failpoint=self._failpoint,
            wall=self._wall,
        )
        votes = [
            VoteFrom(record.rank, snapshot, Vote.PREPARED, fmt.encode(record.prepared)) for record in found
        ]
        decide.run(world_size, votes, structures)
        verdict, reason = verdicts[0] if verdicts else (Verdict.UNKNOWN, "nothing was decided")
        if verdict is Verdict.UNKNOWN:
            with contextlib.suppress(ElasticError):
                if self._catalog.confirm(snapshot.entry):  # another one was faster
                    verdict = Verdict.COMMIT
        if verdict is Verdict.COMMIT:
            return Fate.COMMITTED, ""
        return (Fate.ABORTED if verdict is Verdict.ABORT else Fate.WAITING), reason
