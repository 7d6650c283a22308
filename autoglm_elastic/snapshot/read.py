"""Reading tensors out of a snapshot: target boxes ∩ source boxes, straight into the target where it is
possible.

Each thread reads one chunk at a time, whole, since that is what its digest covers, and nothing is handed over
before the digest is right. Extra memory is one chunk a thread, and none for chunks that lie contiguously in a
target on the CPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final

import torch

from autoglm_elastic.errors import CorruptSnapshot, PlatformError
from autoglm_elastic.ports import BlobReader, StreamBlobs
from autoglm_elastic.snapshot import limits
from autoglm_elastic.snapshot.boxes import part
from autoglm_elastic.snapshot.dtypes import BY_NAME
from autoglm_elastic.snapshot.format import Box, Chunk, Manifest, chunk_nbytes, overlap, pack_path
from autoglm_elastic.snapshot.packs import digest
from autoglm_elastic.snapshot.stage import memory_of

READ_S: Final = 3600.0
"""Bound of one load's reading, whatever its size: a disk that hangs longer than this is broken."""


@dataclass(frozen=True, slots=True)
class Target:
    """`local`, of shape `box[1]`, is to receive `box` of the stored tensor `name`. The dtypes are equal."""

    name: str
    box: Box
    local: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Job:
    name: str
    dtype: str
    chunk: Chunk
    pieces: tuple[tuple[Target, Box], ...]


class PackReaders:
    """The packs of a manifest, opened when first wanted, at most once each; sizes are checked against the
    manifest."""

    def __init__(self, blobs: StreamBlobs, manifest: Manifest) -> None:
        self._blobs, self._packs = blobs, manifest.packs
        self._open: dict[int, BlobReader] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> PackReaders:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for reader in self._open.values():
                reader.close()
            self._open.clear()

    def __getitem__(self, number: int) -> BlobReader:
        """Raises CorruptSnapshot for a pack that is missing or has another size."""
        with self._lock:
            if number not in self._open:
                pack = self._packs[number]
                name = pack_path(pack.sha256)
                try:
                    reader = self._blobs.open(name)
                except FileNotFoundError as error:
                    raise CorruptSnapshot(f"{name} is missing") from error
                if reader.nbytes != pack.nbytes:
                    reader.close()
                    raise CorruptSnapshot(f"{name} has {reader.nbytes} bytes", valid=f"{pack.nbytes} bytes")
                self._open[number] = reader
            return self._open[number]


def read_tensors(blobs: StreamBlobs, manifest: Manifest, targets: Sequence[Target]) -> int:
    """Fills every target. Returns the bytes read. Raises CorruptSnapshot for the first chunk that does not
    verify; targets are partly overwritten then."""
    jobs = _jobs(manifest, targets)
    with PackReaders(blobs, manifest) as readers, torch.no_grad():
        for number in sorted({job.chunk.pack for job in jobs}):
            readers[number]
        threads = min(limits.READ_THREADS_MAX, os.cpu_count() or 1, len(jobs))
        if threads < 2:
            for job in jobs:
                _run(readers, job)
        else:
            _run_all(readers, jobs, threads)
    return sum(chunk_nbytes(job.dtype, job.chunk.sizes) for job in jobs)


def _jobs(manifest: Manifest, targets: Iterable[Target]) -> list[_Job]:
    wanted: dict[str, list[Target]] = {}
    for target in targets:
        wanted.setdefault(target.name, []).append(target)
    jobs = []
    for name, group in wanted.items():
        tensor = manifest.tensors[name]
        for chunk in tensor.chunks:
            box = (chunk.offsets, chunk.sizes)
            pieces = tuple((target, common) for target in group if (common := overlap(target.box, box)))
            if pieces:
                jobs.append(_Job(name, tensor.dtype, chunk, pieces))
    return sorted(jobs, key=lambda job: (job.chunk.pack, job.chunk.begin))


def _run_all(readers: PackReaders, jobs: Sequence[_Job], threads: int) -> None:
    """Contiguous runs of jobs to the threads in turn, so that a few large and many small ones both spread."""
    stop = threading.Event()
    cursor = iter(jobs)
    lock = threading.Lock()

    def work() -> None:
        try:
            with torch.no_grad():
                while not stop.is_set():
                    with lock:
                        batch = [job for _, job in zip(range(8), cursor, strict=False)]
                    if not batch:
                        return
                    for job in batch:
                        _run(readers, job)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(threads, thread_name_prefix="autoglm-read") as pool:
        futures = [pool.submit(work) for _ in range(threads)]
        _, late = wait(futures, timeout=READ_S, return_when=FIRST_EXCEPTION)
        stop.set()
        wait(late, timeout=READ_S)
        for future in futures:
            if not future.done():
                raise PlatformError(f"a read did not end within {READ_S:.0f} s", do="check the disk")
            future.result(timeout=0)


def _run(readers: PackReaders, job: _Job) -> None:
    chunk, reader = job.chunk, readers[job.chunk.pack]
    nbytes = chunk_nbytes(job.dtype, chunk.sizes)
    box = (chunk.offsets, chunk.sizes)
    if len(job.pieces) == 1 and job.pieces[0][1] == box:
        target = job.pieces[0][0]
        inside = part(target.local, target.box, box)
        if (
            inside.device.type == "cpu"
            and inside.is_contiguous()
            and not (inside.is_conj() or inside.is_neg())
        ):
            read_chunk(reader, job.name, chunk, memory_of(inside))
            return
    if nbytes > limits.CHUNK_READ_BYTES_MAX:
        raise CorruptSnapshot(
            f"{reader.name}: chunk of tensor {job.name} has {nbytes} bytes",
            valid=f"{limits.CHUNK_READ_BYTES_MAX}",
        )
    raw = torch.empty(nbytes, dtype=torch.uint8)
    read_chunk(reader, job.name, chunk, memory_of(raw))
    source = raw.view(BY_NAME[job.dtype].torch).view(chunk.sizes)
    for target, common in job.pieces:
        part(target.local, target.box, common).copy_(part(source, box, common))


def read_chunk(reader: BlobReader, name: str, chunk: Chunk, view: memoryview) -> None:
    """Reads and verifies one chunk. Raises CorruptSnapshot naming pack and tensor."""
    reader.read_into(chunk.begin, view)
    if digest(view) != chunk.xxh3:
        raise CorruptSnapshot(f"{reader.name}: tensor {name} at {list(chunk.offsets)}: its digest differs")


def check_packs(blobs: StreamBlobs, manifest: Manifest, names: Mapping[str, object] | Iterable[str]) -> None:
    """The packs of these tensors are there and of the right size: before memory of their declared size is
    allocated."""
    with PackReaders(blobs, manifest) as readers:
        for number in sorted({chunk.pack for name in names for chunk in manifest.tensors[name].chunks}):
            readers[number]
