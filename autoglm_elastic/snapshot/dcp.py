"""torch.distributed.checkpoint over the same format: `dcp.save(state,
storage_writer=SafetensorsWriter(run_dir))`.

Packs, manifest and catalog are those of CheckpointManager, so either reads what the other wrote. What the
plans say of dtypes and shapes may be stale (torch caches plans by class name), so everything is taken from
the data written, and nothing that differs between snapshots lies in a plan. Non-tensor values are JSON, here
too: torch's planners would pickle them, so they are taken from, and put into, the planner's state directly.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from autoglm_elastic.catalog import failpoints, generations, limits, tree
from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog.decide import Decide, Request
from autoglm_elastic.catalog.dtypes import DType
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.merge import earliest, merge, structure_digest
from autoglm_elastic.catalog.opened import OpenPacks
from autoglm_elastic.coordination.clock import SystemClock
from autoglm_elastic.core.commit import Snapshot, Verdict, Vote, VoteFrom
from autoglm_elastic.errors import CorruptSnapshot, PlatformError, UsageError
from autoglm_elastic.keeper import InProcess, WriteJob
from autoglm_elastic.snapshot.boxes import placed
from autoglm_elastic.snapshot.copy import Copy
from autoglm_elastic.snapshot.dtypes import torch_dtype, versions
from autoglm_elastic.snapshot.encode import encode
from autoglm_elastic.snapshot.layout import Part, parts_of
from autoglm_elastic.snapshot.read import read_tensors
from autoglm_elastic.snapshot.scatter import Target
from autoglm_elastic.snapshot.stage import Images
from autoglm_elastic.storage import LocalBlobs

_PathLike = str | os.PathLike[str]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rank tells the coordinator, as bytes in its write results."""

    prepared: fmt.Prepared
    structure: fmt.Structure


@dataclasses.dataclass(slots=True)
class _Items:
    """What one rank's plan says, with the data. `values`: JSON by name."""

    parts: list[Part] = dataclasses.field(default_factory=list)
    local: list[torch.Tensor] = dataclasses.field(default_factory=list)
    shapes: dict[str, fmt.Tensor] = dataclasses.field(default_factory=dict)
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, name: str, dtype: DType, shape: tuple[int, ...], box: fmt.Box, local: torch.Tensor) -> None:
        self.shapes[name] = fmt.Tensor(dtype.name, shape)
        self.parts.extend(parts_of(name, dtype, shape, box, len(self.local)))
        self.local.append(local)


class SafetensorsWriter(StorageWriter):
    """A StorageWriter that commits a snapshot to a run directory.

    Args:
        path: the run directory; or give `checkpoint_id` to dcp.save.
        step: of the snapshot; None for one more than the newest in the catalog.
        generation: of the snapshot; None for the newest that there is, so that it is in the lineage.
        metrics, tags: for the catalog.
    """

    def __init__(
        self,
        path: _PathLike | None = None,
        *,
        step: int | None = None,
        generation: int | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
    ) -> None:
        self.checkpoint_id: _PathLike | None = path
        self._step, self._generation = step, generation
        self._metrics, self._tags = dict(metrics or {}), tuple(tags)
        self._rank = 0
        self.entry: str | None = None
        """The name of the snapshot that was committed last; on the coordinator."""

    def reset(self, checkpoint_id: _PathLike | None = None) -> None:
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
        self.entry = None

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **kwargs: Any) -> None:
        # torch gives the rank only to a parameter of exactly this name.
        self._rank = int(kwargs.get("rank") or 0)
        _blobs(self.checkpoint_id)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Durable packs when this returns. The first result carries this rank's chunk table."""
        items = _Items()
        for item in plan.items:
            if item.type is WriteItemType.BYTE_IO:
                self._lay_out_value(item, planner, items)
            else:
                self._lay_out_tensor(item, planner, items)
        table = fmt.encode(self._write(items))
        results = [
            WriteResult(item.index, item.tensor_storage_size() or 0, table if number == 0 else None)
            for number, item in enumerate(plan.items)
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(self, items: _Items) -> _Table:
        """Raises ElasticError; nothing is left behind then."""
        structure = fmt.Structure(tensors=items.shapes, tree=items.values)
        digest = structure_digest(structure)
        images = Images(items.parts)
        snapshot = Snapshot(0, self._generation or 0)
        keeper = InProcess(_blobs(self.checkpoint_id), rank=self._rank)
        try:
            segment = keeper.segment(max(1, images.nbytes))
            sources = [part.of(items.local[part.source]) for part in images.parts]
            Copy(list(zip(images.views(segment), sources, strict=True)), (), ()).wait(0)
            images.write_heads(segment)
            job = WriteJob(snapshot, segment.number, images.packs, b"", b"")
            pending = keeper.write(job)
            packs = pending.wait(limits.VOTE_S)
            keeper.settled(snapshot, Verdict.COMMIT)
        except BaseException:
            keeper.settled(snapshot, Verdict.ABORT)
            raise
        finally:
            keeper.close()
        mine = fmt.Prepared(packs=packs, structure=digest, cover=images.cover, since=pending.since)
        return _Table(mine, structure)

    def _lay_out_tensor(self, item: WriteItem, planner: SavePlanner, items: _Items) -> None:
        name = item.index.fqn
        data = planner.resolve_data(item)
        if not isinstance(data, torch.Tensor) or item.tensor_data is None:
            raise UsageError(f"{name} is planned as a tensor, but is a {type(data).__name__}")
        where = placed(data, name)
        box = (tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes))
        shape = tuple(item.tensor_data.size)
        if where.shape != box[1]:
            raise UsageError(
                f"the plan says that a part of {name} is {list(box[1])}, but it is {list(where.shape)}",
                do="turn the planner's plan caching off",
            )
        items.add(name, where.dtype, shape, box, where.local)

    def _lay_out_value(self, item: WriteItem, planner: SavePlanner, items: _Items) -> None:
        name = item.index.fqn
        if not isinstance(planner, DefaultSavePlanner):
            raise UsageError(
                f"{name} is no tensor", valid="a DefaultSavePlanner, or only tensors in the state"
            )

        def name_array(path: tree.Path, array: torch.Tensor) -> str:
            where = placed(array, tree.path_name(path))
            inner = tree.path_name(path)
            items.add(inner, where.dtype, where.shape, where.box, where.local)
            return inner

        items.values[name] = encode(planner.lookup_object(item.index), (name,), name_array)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: manifest, catalog entry (the commit), hints. Raises PlatformError when not
        committed."""
        blobs = _blobs(self.checkpoint_id)
        catalog = Catalog(blobs)
        step = self._step
        if step is None:
            step = max((entry.step for entry in catalog.entries()), default=-1) + 1
        generation = self._generation
        if generation is None:
            generation = generations.newest_number(catalog)
        snapshot = Snapshot(step, generation)
        if snapshot.entry in catalog.names():
            raise UsageError(f"snapshot {snapshot.entry} is already in the catalog", do="give another step")
        whole = self._whole(metadata, results, snapshot)
        ruling: list[tuple[Verdict, str]] = []
        decide = Decide(
            blobs,
            catalog,
            Request(
                snapshot,
                "full",
                self._metrics,
                self._tags,
                world_size=len(results),
                environment=versions(),
            ),
            announce=lambda verdict, reason: ruling.append((verdict, reason)),
            failpoint=failpoints.none,
            wall=SystemClock().wall,
        )
        prepared, structure = whole
        votes = [VoteFrom(0, snapshot, Vote.PREPARED, fmt.encode(prepared))]
        decide.run(1, votes, {prepared.structure: structure})
        if not ruling or ruling[0][0] is not Verdict.COMMIT:
            reason = ruling[0][1] if ruling else "undecided"
            raise PlatformError(f"snapshot {snapshot.entry} was not committed: {reason}")
        self.entry = snapshot.entry

    def _whole(
        self, metadata: Metadata, results: list[list[WriteResult]], snapshot: Snapshot
    ) -> tuple[fmt.Prepared, fmt.Structure]:
        """The ranks' tables as one, with the state's structure as the planner knows it."""
        tables = [row.storage_data for rows in results for row in rows if row.storage_data is not None]
        if len(tables) > limits.TENSORS_MAX or not all(isinstance(table, bytes) for table in tables):
            raise CorruptSnapshot("a rank's write results have the wrong form")
        ranks = [fmt.decode(table, _Table, f"the table of rank {rank}") for rank, table in enumerate(tables)]
        merged = merge(
            [table.prepared for table in ranks],
            {table.prepared.structure: table.structure for table in ranks},
            step=snapshot.step,
            generation=snapshot.generation,
            world_size=len(results),
            environment=versions(),
            config_digest=None,
        )
        values: dict[str, Any] = merged.tree or {}
        nodes: dict[str, Any] = {}
        for name, kind in metadata.state_dict_metadata.items():
            written = merged.tensors if isinstance(kind, TensorStorageMetadata) else values
            if name not in written:
                raise UsageError(f"{name} is in the plan, but no rank wrote it", do="turn plan caching off")
            nodes[name] = {"$": "tensor", "v": name} if written is merged.tensors else values[name]
        paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
        structure = tree.nest({tuple(paths.get(name, (name,))): node for name, node in nodes.items()})
        whole = fmt.Structure(tensors=merged.tensors, tree=structure)
        cover = sum(table.prepared.cover for table in ranks) % (1 << 64)
        prepared = fmt.Prepared(
            packs=merged.packs,
            structure=structure_digest(whole),
            cover=cover,
            since=earliest(table.prepared for table in ranks),
        )
        return prepared, whole

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: _PathLike) -> bool:
        return "://" not in os.fspath(checkpoint_id)


class SafetensorsReader(StorageReader):
    """A StorageReader of a run directory, whoever wrote it. Every chunk is verified.

    Args:
        path: the run directory; or give `checkpoint_id` to dcp.load.
        entry: the snapshot's name; None for the newest of the lineage.
    """

    def __init__(self, path: _PathLike | None = None, *, entry: str | None = None) -> None:
        self.checkpoint_id: _PathLike | None = path
        self._wanted = entry
        self._entry: fmt.CatalogEntry | None = None
        self._manifest: fmt.Manifest | None = None
        self._nodes: dict[str, Any] = {}

    def reset(self, checkpoint_id: _PathLike | None = None) -> None:
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
        self._entry = self._manifest = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        blobs = _blobs(self.checkpoint_id)
        catalog = Catalog(blobs)
        entry = catalog.entry(self._wanted) if self._wanted else catalog.newest()
        if entry is None:
            raise UsageError(f"{self.checkpoint_id} has no snapshot", do="save one first")
        manifest = catalog.manifest(entry)
        self._entry, self._manifest = entry, manifest
        with OpenPacks(blobs, manifest) as opened:
            chunks = opened.all_chunks()
        paths = {tree.path_name(path): (path, node) for path, node in tree.leaves(manifest.tree)}
        self._nodes = {name: node for name, (_, node) in paths.items()}
        return Metadata(
            state_dict_metadata={
                name: _storage(manifest, chunks, node) for name, node in self._nodes.items()
            },
            planner_data={name: path for name, (path, _) in paths.items()},
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        if self._manifest is None:
            self.read_metadata()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        entry, _ = self._opened()
        return [dataclasses.replace(plan, storage_data=entry.name) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        entry, manifest = self._opened()
        if plan.storage_data != entry.name:
            raise PlatformError(
                f"this rank chose snapshot {entry.name}, the coordinator {plan.storage_data}",
                do="name the entry: a snapshot was committed while the ranks began to load",
            )
        blobs = _blobs(self.checkpoint_id)
        targets: list[Target] = []
        tensors: list[tuple[ReadItem, torch.Tensor, torch.Tensor]] = []
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                _put_value(planner, item, self._value(item.storage_index.fqn, targets))
                continue
            name = self._nodes[item.storage_index.fqn]["v"]
            box = (_sum(item.storage_index, item.storage_offsets), tuple(item.lengths))
            wanted = planner.resolve_tensor(item)
            local = wanted.detach()
            stored = torch_dtype(manifest.tensors[name].dtype)
            if local.dtype != stored:
                local = torch.empty(box[1], dtype=stored)
            targets.append(Target(name, box, local))
            tensors.append((item, wanted, local))
        read_tensors(blobs, manifest, targets)
        with torch.no_grad():
            for item, wanted, local in tensors:
                if local.dtype != wanted.dtype:
                    wanted.detach().copy_(local)
                planner.commit_tensor(item, wanted)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _opened(self) -> tuple[fmt.CatalogEntry, fmt.Manifest]:
        if self._entry is None or self._manifest is None:
            self.read_metadata()
        if self._entry is None or self._manifest is None:
            raise UsageError("the reader was not set up")
        return self._entry, self._manifest

    def _value(self, name: str, targets: list[Target]) -> Any:
        """A leaf's value; numpy arrays in it are filled when `targets` are read."""
        _, manifest = self._opened()

        def array(stored: str) -> Any:
            tensor = manifest.tensors[stored]
            fresh = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
            targets.append(Target(stored, ((0,) * len(tensor.shape), tensor.shape), fresh))
            return fresh.numpy()

        return tree.decode(self._nodes[name], array, array)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: _PathLike) -> bool:
        return "://" not in os.fspath(checkpoint_id)


def _blobs(path: _PathLike | None) -> LocalBlobs:
    if path is None:
        raise UsageError("no run directory", do="give the writer or reader a path, or dcp a checkpoint_id")
    return LocalBlobs(path)


def _sum(index: MetadataIndex, offsets: Iterable[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(index.offset or (), offsets, strict=True))


def _storage(
    manifest: fmt.Manifest, chunks: Mapping[str, Sequence[fmt.Chunk]], node: Any
) -> TensorStorageMetadata | BytesStorageMetadata:
    if tree.code_of(node) != "tensor":
        return BytesStorageMetadata()
    tensor = manifest.tensors[node["v"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=torch_dtype(tensor.dtype)),
        torch.Size(tensor.shape),
        [
            ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            for chunk in chunks[node["v"]]
        ],
    )


def _put_value(planner: LoadPlanner, item: ReadItem, value: Any) -> None:
    """What DefaultLoadPlanner.load_bytes does, without the pickle in between."""
    if (
        not isinstance(planner, DefaultLoadPlanner)
        or type(planner).load_bytes is not DefaultLoadPlanner.load_bytes
    ):
        raise UsageError(
            f"{item.dest_index.fqn} is no tensor, and {type(planner).__name__} wants it pickled",
            valid="a DefaultLoadPlanner, or only tensors in the state",
        )
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[item.dest_index.fqn], value)
    else:
        planner.state_dict[item.dest_index.fqn] = value
