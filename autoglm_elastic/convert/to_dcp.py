"""Export as a stock directory of torch.distributed.checkpoint, which `dcp.load` and `FileSystemReader` open.

torch's own writer writes it, `.metadata` (a pickle, that is the peer's format) included; this room gives it what to
write, a stored chunk at a time, and the writer holds the last one of each tensor until its file is closed. Values
beside the tensors are written as torch's planner writes them. Nothing is unpickled."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from autoglm_elastic.catalog import limits, tree
from autoglm_elastic.catalog.format import Chunk, Manifest
from autoglm_elastic.catalog.opened import OpenPacks
from autoglm_elastic.convert._folder import fresh
from autoglm_elastic.convert._select import OnBytes, subtree
from autoglm_elastic.convert.from_dcp import DcpSource
from autoglm_elastic.errors import ElasticError, PlatformError
from autoglm_elastic.ports import StreamBlobs
from autoglm_elastic.snapshot.dtypes import torch_dtype
from autoglm_elastic.snapshot.scatter import Job, Scatter, Target


def export_dcp(
    blobs: StreamBlobs,
    manifest: Manifest,
    target: Path,
    *,
    prefix: str = "",
    on_bytes: OnBytes = lambda nbytes: None,
) -> int:
    """Writes the new folder `target`. Returns how many items it holds.

    Args:
        prefix: only what is below this path of the state, under names without it.
        on_bytes: told the bytes of tensors that were just read.

    Raises UsageError, CorruptSnapshot, PlatformError; nothing is left behind then.
    """
    with OpenPacks(blobs, manifest) as opened, fresh(target) as folder, warnings.catch_warnings():
        planner = _Planner(opened, manifest, subtree(manifest, prefix), on_bytes)
        warnings.simplefilter("ignore")  # torch's, about saving without a process group
        writer = FileSystemWriter(folder, thread_count=limits.READ_THREADS_MAX, sync_files=True)
        try:
            save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            causes = [str(cause[0]) for cause in error.failures.values()]
            raise PlatformError(f"writing {target}: {'; '.join(causes)[:200]}") from error
        if planner.problem is not None:
            raise planner.problem
        DcpSource(folder)  # what one of torch's threads could not write is missing or too short
    return len(planner.leaves)


class _Planner(SavePlanner):
    """What torch's planner would plan for the state, from the manifest alone."""

    def __init__(self, opened: OpenPacks, manifest: Manifest, node: Any, on_bytes: OnBytes) -> None:
        self._opened, self._manifest, self._on_bytes = opened, manifest, on_bytes
        found = {tree.path_name(path) or "value": (path, leaf) for path, leaf in tree.leaves(node)}
        self.leaves = {name: leaf for name, (_, leaf) in found.items()}
        self._paths = {name: path or ("value",) for name, (path, _) in found.items()}
        self._chunks = opened.all_chunks()
        self.problem: ElasticError | None = None
        """The first thing that could not be read; what was written is worth nothing then."""
        self._at = {(name, chunk.offsets): chunk for name, some in self._chunks.items() for chunk in some}

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """The state is the snapshot."""

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, leaf in self.leaves.items():
            stored = _stored(leaf)
            if stored is None:
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
                continue
            tensor = self._manifest.tensors[stored]
            properties = TensorProperties(dtype=torch_dtype(tensor.dtype))
            for number, chunk in enumerate(self._pieces(stored)):
                offsets = torch.Size(chunk.offsets)
                data = TensorWriteData(
                    ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)),
                    properties,
                    torch.Size(tensor.shape),
                )
                items.append(
                    WriteItem(MetadataIndex(name, offsets, number), WriteItemType.SHARD, tensor_data=data)
                )
        return SavePlan(items)

    def _pieces(self, stored: str) -> list[Chunk]:
        """The chunks as stored; a tensor without elements may have none, but is written."""
        shape = self._manifest.tensors[stored].shape
        return self._chunks[stored] or [Chunk((0,) * len(shape), shape, 0, 0, 0, "", "")]

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        described: dict[str, Any] = {}
        for name, leaf in self.leaves.items():
            stored = _stored(leaf)
            if stored is None:
                described[name] = BytesStorageMetadata()
                continue
            tensor = self._manifest.tensors[stored]
            described[name] = TensorStorageMetadata(
                TensorProperties(dtype=torch_dtype(tensor.dtype)),
                torch.Size(tensor.shape),
                [
                    ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                    for chunk in self._pieces(stored)
                ],
            )
        return all_plans, Metadata(described, planner_data=self._paths)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        leaf = self.leaves[write_item.index.fqn]
        stored = _stored(leaf)
        if stored is None or write_item.tensor_data is None:
            data = io.BytesIO()
            torch.save(tree.decode(leaf, _no_tensor, _no_tensor), data)
            return data
        box = (tuple(write_item.tensor_data.chunk.offsets), tuple(write_item.tensor_data.chunk.sizes))
        dtype = self._manifest.tensors[stored].dtype
        local = torch.empty(box[1], dtype=torch_dtype(dtype))
        if local.numel():
            chunk = self._at[stored, box[0]]
            job = Job(stored, dtype, chunk, ((Target(stored, box, local), box),))
            try:
                Scatter().run(self._opened.reader(chunk.pack), [job])
            except ElasticError as error:
                # In one of torch's threads, where an error would be lost (pytorch#191391).
                self.problem = self.problem or error
        self._on_bytes(local.nbytes)
        return local


def _stored(leaf: Any) -> str | None:
    return leaf["v"] if tree.code_of(leaf) in ("tensor", "array") else None


def _no_tensor(name: str) -> Any:
    raise KeyError(name)  # a leaf without a tensor inside, as tree.leaves gives it
