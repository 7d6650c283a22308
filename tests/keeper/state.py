"""What a rank would stage, without torch: float32 tensors of bytes that tell their snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import packs, prepared
from autoglm_elastic.catalog.decide import Request
from autoglm_elastic.catalog.dtypes import BY_NAME, DType
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.merge import structure_digest
from autoglm_elastic.catalog.verify import verify
from autoglm_elastic.core.commit import Snapshot
from autoglm_elastic.keeper import Keeper, PackImage, Pending, Segment, WriteJob
from autoglm_elastic.storage import LocalBlobs

ALIGNMENT = packs.ALIGNMENT


@dataclass(frozen=True)
class Part:
    name: str
    dtype: DType
    shape: tuple[int, ...]
    box: fmt.Box
    nbytes: int


def part(name: str, elements: int, begin: int = 0, whole: int | None = None) -> Part:
    shape = (elements if whole is None else whole,)
    return Part(name, BY_NAME["float32"], shape, ((begin,), (elements,)), 4 * elements)


class Share:
    """One rank's even share of `tensors` tensors of `elements` elements each, in packs of a tensor each."""

    def __init__(
        self, *, rank: int = 0, world_size: int = 1, tensors: int = 3, elements: int = 1 << 16
    ) -> None:
        assert elements % world_size == 0
        mine = elements // world_size
        self.rank, self.world_size = rank, world_size
        parts = [part(f"t{number}", mine, rank * mine, elements) for number in range(tensors)]
        self.plans = [plan for one in parts for plan in packs.plan_packs([one])]
        self.images = []
        at = 0
        for plan in self.plans:
            head = len(plan.head)
            spans = tuple(
                (head + start, each.nbytes) for each, start in zip(plan.parts, plan.starts, strict=True)
            )
            self.images.append(PackImage(at, head, plan.digests_at, spans, head + plan.nbytes))
            at += -(-(head + plan.nbytes) // ALIGNMENT) * ALIGNMENT
        self.nbytes = at
        self.structure = fmt.Structure(
            tensors={one.name: fmt.Tensor("float32", one.shape) for one in parts},
            tree={one.name: {"$": "tensor", "v": one.name} for one in parts},
        )
        self.vote = fmt.encode(
            fmt.Prepared(
                packs=(),
                structure=structure_digest(self.structure),
                cover=fmt.cover((one.name, fmt.elements(one.box[1])) for one in parts),
            )
        )

    def fill(self, segment: Segment, value: int) -> None:
        """Every byte of every tensor is `value`."""
        for image, plan in zip(self.images, self.plans, strict=True):
            data = image.start + image.head_nbytes
            segment.memory[image.start : data] = plan.head
            segment.memory[data : image.start + image.nbytes] = bytes([value]) * plan.nbytes

    def details(self, snapshot: Snapshot) -> bytes:
        wish = prepared.Wish.of(Request(snapshot)) if self.rank == 0 else None
        return fmt.encode(prepared.Details(structure=self.structure, wish=wish))

    def job(self, snapshot: Snapshot, segment: Segment) -> WriteJob:
        return WriteJob(snapshot, segment.number, tuple(self.images), self.vote, self.details(snapshot))

    def save(self, keeper: Keeper, snapshot: Snapshot) -> Pending:
        segment = keeper.segment(self.nbytes)
        self.fill(segment, snapshot.step)
        return keeper.write(self.job(snapshot, segment))


def committed(run_dir: Path) -> list[int]:
    """Steps in the catalog; each verifies to the last byte and is of one snapshot."""
    blobs = LocalBlobs(run_dir)
    catalog = Catalog(blobs)
    entries = catalog.entries()
    for entry in entries:
        assert verify(blobs, catalog, entry) == []
        for pack in catalog.manifest(entry).packs:
            data = blobs.read(fmt.pack_path(pack.sha256), bytes_max=1 << 30)[pack.head :]
            assert set(data) == {entry.step}, "a mixture"
    return [entry.step for entry in entries]


def records(run_dir: Path) -> list[int]:
    """Steps of which prepare records are there."""
    return [snapshot.step for snapshot in prepared.entries(LocalBlobs(run_dir))]
