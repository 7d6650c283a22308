"""Prepare: this rank's staged bytes become durable packs, and the table of their chunks its vote."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from autoglm_elastic.ports import StreamBlobs
from autoglm_elastic.snapshot import format as fmt
from autoglm_elastic.snapshot.failpoints import Failpoints
from autoglm_elastic.snapshot.packs import Written, remove, write_pack
from autoglm_elastic.snapshot.stage import Staged


@dataclass(slots=True)
class Prepare:
    """The packs that one rank wrote for one snapshot. `discard` takes back what was not there before."""

    blobs: StreamBlobs
    failpoint: Failpoints
    written: list[Written]

    @classmethod
    def begin(cls, blobs: StreamBlobs, failpoint: Failpoints) -> Prepare:
        return cls(blobs, failpoint, [])

    def write(self, staged: Staged, *, list_all: bool) -> fmt.Prepared:
        """All packs, durable. `list_all`: name every known tensor, also those of which this rank writes
        nothing, so that the coordinator misses what nobody wrote. Raises ElasticError."""
        for plan, data in zip(staged.plans, staged.data, strict=True):
            self.written.append(write_pack(self.blobs, plan, data))
            self.failpoint("pack_written")
        return fmt.Prepared(
            packs=tuple(one.pack for one in self.written),
            tensors=self._table(staged, list_all),
            tree=staged.tree,
        )

    def _table(self, staged: Staged, list_all: bool) -> dict[str, fmt.Tensor]:
        chunks: dict[str, list[fmt.Chunk]] = {name: [] for name in staged.shapes} if list_all else {}
        for number, (plan, one) in enumerate(zip(staged.plans, self.written, strict=True)):
            for part, chunk in zip(plan.parts, one.chunks, strict=True):
                chunks.setdefault(part.name, []).append(msgspec.structs.replace(chunk, pack=number))
        return {name: fmt.Tensor(*staged.shapes[name], tuple(mine)) for name, mine in chunks.items()}

    def discard(self) -> None:
        """The snapshot never happened: remove the packs that it brought. What cannot be removed stays as
        garbage."""
        remove(self.blobs, (fmt.pack_path(one.pack.sha256) for one in self.written if one.created))
        self.written.clear()
