"""One chunk, or a run of small ones, from a pack into memory: read block by block, each block hashed while it
is still in the processor's cache.

What lies contiguously in a target on the CPU is read straight into it; the rest goes through one buffer a
thread. It must never hand over bytes of a chunk through that buffer before the chunk's digest is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import torch

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.format import Box, Chunk
from autoglm_elastic.catalog.packs import Digest
from autoglm_elastic.errors import CorruptSnapshot
from autoglm_elastic.ports import BlobReader
from autoglm_elastic.snapshot.boxes import part
from autoglm_elastic.snapshot.dtypes import torch_dtype
from autoglm_elastic.snapshot.stage import memory_of

VIEWS_MAX: Final = 512
"""Buffers in one system call; below every system's IOV_MAX."""


class Target(msgspec.Struct, frozen=True, gc=False):
    """`local`, of shape `box[1]`, is to receive `box` of the stored tensor `name`. The dtypes are equal."""

    name: str
    box: Box
    local: torch.Tensor


class Job(msgspec.Struct, frozen=True, gc=False):
    """A chunk and who takes which box of it."""

    name: str
    dtype: str
    chunk: Chunk
    pieces: tuple[tuple[Target, Box], ...]


class Scatter:
    """One thread's reading. Its buffer is kept from chunk to chunk, so that no page is touched anew."""

    def __init__(self) -> None:
        self._raw = torch.empty(0, dtype=torch.uint8)

    def run(self, reader: BlobReader, jobs: Sequence[Job]) -> None:
        """Jobs that lie one behind the other in one pack. Raises CorruptSnapshot."""
        stream = _Stream(reader, jobs[0].chunk.begin)
        for job in jobs:
            views = _direct(job)
            if views is None:
                stream.flush()
                self._through_buffer(reader, job)
                stream.skip(job.chunk.nbytes)
                continue
            hasher = stream.begin(job)
            for view, nbytes in views:
                if view is not None:
                    stream.add(view, hasher)
                    continue
                for at in range(0, nbytes, reader.block):
                    stream.add_unwanted(self._buffer(reader.block)[: min(reader.block, nbytes - at)], hasher)
        stream.flush()

    def _buffer(self, nbytes: int) -> memoryview:
        return memory_of(self._tensor(nbytes))

    def _tensor(self, nbytes: int, *, pinned: bool = False) -> torch.Tensor:
        if self._raw.numel() < nbytes or (pinned and not self._raw.is_pinned()):
            self._raw = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return self._raw[:nbytes]

    def _through_buffer(self, reader: BlobReader, job: Job) -> None:
        chunk = job.chunk
        if chunk.nbytes > limits.CHUNK_READ_BYTES_MAX:
            raise CorruptSnapshot(
                f"{reader.name}: chunk of tensor {job.name} has {chunk.nbytes} bytes",
                valid=f"at most {limits.CHUNK_READ_BYTES_MAX}",
            )
        on_cuda = any(target.local.is_cuda for target, _ in job.pieces)
        raw = self._tensor(chunk.nbytes, pinned=on_cuda)
        stream = _Stream(reader, chunk.begin)
        stream.add(memory_of(raw), stream.begin(job))
        stream.flush()
        box = (chunk.offsets, chunk.sizes)
        source = raw.view(torch_dtype(job.dtype)).view(chunk.sizes)
        for target, common in job.pieces:
            part(target.local, target.box, common).copy_(part(source, box, common))


class _Stream:
    """Consecutive bytes of a pack, gathered until a block is full."""

    def __init__(self, reader: BlobReader, at: int) -> None:
        self._reader, self._at = reader, at
        self._views: list[memoryview] = []
        self._hashers: list[Any] = []
        self._nbytes = 0
        self._unwanted = False
        self._open: list[tuple[Job, Any]] = []

    def begin(self, job: Job) -> Any:
        hasher = Digest()
        self._open.append((job, hasher))
        return hasher

    def add(self, view: memoryview, hasher: Any) -> None:
        block = self._reader.block
        for at in range(0, view.nbytes, block):
            piece = view[at : at + block] if view.nbytes > block else view
            if self._views and (self._nbytes + piece.nbytes > block or len(self._views) >= VIEWS_MAX):
                self._read()
            self._views.append(piece)
            self._hashers.append(hasher)
            self._nbytes += piece.nbytes

    def add_unwanted(self, view: memoryview, hasher: Any) -> None:
        """The same for bytes that nobody keeps: `view` may be given again, but once in a block."""
        if self._unwanted:
            self._read()
        self.add(view, hasher)
        self._unwanted = True

    def _read(self) -> None:
        self._unwanted = False
        self._reader.scatter_into(self._at, self._views)
        self._at += self._nbytes
        for view, hasher in zip(self._views, self._hashers, strict=True):
            hasher.update(view)
        self._views, self._hashers, self._nbytes = [], [], 0

    def flush(self) -> None:
        """Everything added is read. Raises CorruptSnapshot for a chunk whose digest differs."""
        if self._views:
            self._read()
        for job, hasher in self._open:
            if hasher.hexdigest() != job.chunk.xxh3:
                where = f"{self._reader.name}: tensor {job.name} at {list(job.chunk.offsets)}"
                raise CorruptSnapshot(f"{where}: its digest differs")
        self._open.clear()

    def skip(self, nbytes: int) -> None:
        self._at += nbytes


def _direct(job: Job) -> list[tuple[memoryview | None, int]] | None:
    """The chunk's bytes in their order as (where they go, how many); None for where: nobody wants them. None
    instead of a list: some piece is not contiguous on both sides."""
    chunk = job.chunk
    if len(job.pieces) == 1:
        target, common = job.pieces[0]
        if common[1] == chunk.sizes and common == target.box and is_plain(target.local):
            return [(memory_of(target.local), chunk.nbytes)]
    found: list[tuple[int, memoryview]] = []
    for target, common in job.pieces:
        inside = part(target.local, target.box, common)
        if not is_plain(inside) or not _is_run(chunk.sizes, common[1]):
            return None
        begin = 0
        for offset, base, size in zip(common[0], chunk.offsets, chunk.sizes, strict=True):
            begin = begin * size + offset - base
        found.append((begin * inside.element_size(), memory_of(inside)))
    found.sort(key=lambda item: item[0])
    views: list[tuple[memoryview | None, int]] = []
    at = 0
    for begin, view in found:
        if begin < at:
            return None
        if begin > at:
            views.append((None, begin - at))
        views.append((view, view.nbytes))
        at = begin + view.nbytes
    if at < chunk.nbytes:
        views.append((None, chunk.nbytes - at))
    return views


def is_plain(tensor: torch.Tensor) -> bool:
    """Its bytes lie in memory one behind the other, as they are stored."""
    return tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def _is_run(outer: Sequence[int], inner: Sequence[int]) -> bool:
    """A box of sizes `inner` within one of sizes `outer` is one stretch of its elements."""
    dim = next((dim for dim in range(len(outer)) if inner[dim] != 1), len(outer))
    return math.prod(inner[dim + 1 :]) == math.prod(outer[dim + 1 :])
