"""The one place that knows how ours and DCP plan a snapshot inside: each rank's own part, and what the
coordinator does with all of them. Simulated ranks, no input or output, no messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog.merge import merge
from autoglm_elastic.snapshot.layout import Layout
from autoglm_elastic.snapshot.stage import Images

ROWS: Final = 1024
"""Of each tensor: one a rank in the largest world."""
COLUMNS: Final = 8


_HEAD_BYTES: Final = 1 << 20
"""Nobody reads the simulated packs: any head will do."""


class Planner(Protocol):
    item_bytes: int
    """About what one tensor of one simulated rank takes in the memory of this one process."""

    def local(self, state: dict[str, Any], rank: int, world_size: int) -> Any:
        """One rank's part, from its live state."""

    def all_locals(self, first: Any, world_size: int) -> list[Any]:
        """What all ranks would have, made from rank 0's; not measured."""

    def merged(self, locals_: list[Any]) -> Any:
        """The coordinator's work."""


@contextmanager
def simulated(rank: int, world_size: int) -> Iterator[DeviceMesh]:
    """A process group and mesh that know their size and send nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())  # type: ignore[no-untyped-call]
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


def sharded_state(tensors: int, mesh: DeviceMesh) -> dict[str, Any]:
    """`tensors` tensors of ROWS x COLUMNS, this rank's rows of each."""
    local = torch.zeros(ROWS // mesh.size(), COLUMNS)
    shape = torch.Size((ROWS, COLUMNS))
    return {
        "model": {
            f"layers.{number}.weight": DTensor.from_local(
                local.clone(), mesh, [Shard(0)], run_check=False, shape=shape, stride=(COLUMNS, 1)
            )
            for number in range(tensors)
        }
    }


@dataclass(frozen=True, slots=True)
class _OurLocal:
    prepared: fmt.Prepared
    structure: fmt.Structure


class OurPlanner:
    item_bytes = 0

    def local(self, state: dict[str, Any], rank: int, world_size: int) -> _OurLocal:
        layout = Layout(state, rank, world_size)
        images = Images(layout.parts)
        packs = tuple(
            fmt.Pack(f"{rank:064x}", _HEAD_BYTES + image.nbytes, _HEAD_BYTES, rank) for image in images.packs
        )
        structure = layout.structure(layout.first().values)
        prepared = fmt.Prepared(packs=packs, structure=layout.digest, cover=images.cover)
        return _OurLocal(prepared, structure)

    def all_locals(self, first: _OurLocal, world_size: int) -> list[_OurLocal]:
        return [
            _OurLocal(
                msgspec.structs.replace(
                    first.prepared,
                    packs=tuple(
                        msgspec.structs.replace(pack, sha256=f"{rank:064x}", rank=rank)
                        for pack in first.prepared.packs
                    ),
                ),
                first.structure,
            )
            for rank in range(world_size)
        ]

    def merged(self, locals_: list[_OurLocal]) -> fmt.Manifest:
        manifest = merge(
            [one.prepared for one in locals_],
            {one.prepared.structure: one.structure for one in locals_},
            step=1,
            generation=0,
            world_size=len(locals_),
            environment={},
            config_digest=None,
        )
        fmt.check_manifest(manifest, "the simulated ranks' state")
        return manifest


class DcpPlanner:
    item_bytes = 3000

    def local(self, state: dict[str, Any], rank: int, world_size: int) -> Any:
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, None, rank == 0)
        return planner.create_local_plan()

    def all_locals(self, first: Any, world_size: int) -> list[Any]:
        rows = ROWS // world_size
        return [
            SavePlan([_moved(item, rank * rows) for item in first.items], planner_data=first.planner_data)
            for rank in range(world_size)
        ]

    def merged(self, locals_: list[Any]) -> Any:
        return DefaultSavePlanner().create_global_plan(locals_)


def _moved(item: WriteItem, row: int) -> WriteItem:
    if item.tensor_data is None:
        return item
    offsets = torch.Size((row, 0))
    chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(item.tensor_data.chunk.sizes))
    return replace(
        item,
        index=MetadataIndex(item.index.fqn, offsets),
        tensor_data=replace(item.tensor_data, chunk=chunk),
    )


PLANNERS: Final[dict[str, Planner]] = {"ours": OurPlanner(), "dcp": DcpPlanner()}
