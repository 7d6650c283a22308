"""Prepare: this rank's staged bytes become durable packs, and their names its vote."""

from __future__ import annotations

from dataclasses import dataclass

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog.failpoints import Failpoints
from autoglm_elastic.catalog.write import Written, remove, write_pack
from autoglm_elastic.ports import StreamBlobs
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

    def write(self, staged: Staged, rank: int) -> fmt.Prepared:
        """All packs, durable. Raises ElasticError."""
        for plan, data in zip(staged.plans, staged.data, strict=True):
            self.written.append(write_pack(self.blobs, plan, data, rank))
            self.failpoint("pack_written")
        packs = tuple(one.pack for one in self.written)
        return fmt.Prepared(packs=packs, structure=staged.digest, cover=staged.cover)

    def discard(self) -> None:
        """The snapshot never happened: remove the packs that it brought. What cannot be removed stays as
        garbage."""
        remove(self.blobs, (fmt.pack_path(one.pack.sha256) for one in self.written if one.created))
        self.written.clear()
