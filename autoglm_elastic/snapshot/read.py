"""Reading tensors out of a snapshot: target boxes ∩ source boxes, straight into the target where it is
possible.

Each thread reads one chunk at a time, whole, since that is what its digest covers, and nothing is handed over
before the digest is right. Extra memory is one chunk a thread, and none for chunks that lie contiguously in a
target on the CPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final

import torch

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.format import Box, Chunk, Manifest, cover_problem, overlap
from autoglm_elastic.catalog.opened import OpenPacks
from autoglm_elastic.catalog.packs import digest
from autoglm_elastic.errors import CorruptSnapshot, PlatformError
from autoglm_elastic.ports import BlobReader, StreamBlobs
from autoglm_elastic.snapshot.boxes import part
from autoglm_elastic.snapshot.dtypes import torch_dtype
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


def read_tensors(blobs: StreamBlobs, manifest: Manifest, targets: Sequence[Target]) -> int:
    """Fills every target. Returns the bytes read. Raises CorruptSnapshot for the first chunk that does not
    verify; targets are partly overwritten then."""
    with OpenPacks(blobs, manifest) as opened, torch.no_grad():
        jobs = _jobs(opened, manifest, targets)
        threads = min(limits.READ_THREADS_MAX, os.cpu_count() or 1, len(jobs))
        if threads < 2:
            for job in jobs:
                _run(opened, job)
        else:
            _run_all(opened, jobs, threads)
    return sum(job.chunk.nbytes for job in jobs)


def _jobs(opened: OpenPacks, manifest: Manifest, targets: Iterable[Target]) -> list[_Job]:
    """Raises CorruptSnapshot where the stored chunks do not cover a target exactly once."""
    wanted: dict[str, list[Target]] = {}
    for target in targets:
        wanted.setdefault(target.name, []).append(target)
    stored = opened.all_chunks() if wanted else {}
    jobs = []
    for name, group in wanted.items():
        covered: list[list[Box]] = [[] for _ in group]
        for chunk in stored[name]:
            box = (chunk.offsets, chunk.sizes)
            pieces = []
            for number, target in enumerate(group):
                common = overlap(target.box, box)
                if common:
                    pieces.append((target, common))
                    inside = tuple(a - b for a, b in zip(common[0], target.box[0], strict=True))
                    covered[number].append((inside, common[1]))
            if pieces:
                jobs.append(_Job(name, manifest.tensors[name].dtype, chunk, tuple(pieces)))
        for target, boxes in zip(group, covered, strict=True):
            problem = cover_problem(target.box[1], boxes)
            if problem:
                raise CorruptSnapshot(f"tensor {name}: {problem}")
    return sorted(jobs, key=lambda job: (job.chunk.pack, job.chunk.begin))


def _run_all(opened: OpenPacks, jobs: Sequence[_Job], threads: int) -> None:
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
                        _run(opened, job)
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


def _run(opened: OpenPacks, job: _Job) -> None:
    chunk, reader = job.chunk, opened.reader(job.chunk.pack)
    nbytes = chunk.nbytes
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
    source = raw.view(torch_dtype(job.dtype)).view(chunk.sizes)
    for target, common in job.pieces:
        part(target.local, target.box, common).copy_(part(source, box, common))


def read_chunk(reader: BlobReader, name: str, chunk: Chunk, view: memoryview) -> None:
    """Reads and verifies one chunk. Raises CorruptSnapshot naming pack and tensor."""
    reader.read_into(chunk.begin, view)
    if digest(view) != chunk.xxh3:
        raise CorruptSnapshot(f"{reader.name}: tensor {name} at {list(chunk.offsets)}: its digest differs")
