"""Reading tensors out of a snapshot: target boxes ∩ source boxes, by several threads, each byte verified.

Packs are opened in the order in which they are likely to be wanted, and no more of them than it takes to cover
the targets, so a rank of a thousand does not read a thousand headers. A chunk is read whole, since that is
what its digest covers. Extra memory is one chunk a thread, and one block where chunks lie contiguously in
targets on the CPU."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Final

import torch

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.format import Box, Manifest, cover_problem, overlap
from autoglm_elastic.catalog.opened import OpenPacks
from autoglm_elastic.errors import CorruptSnapshot, PlatformError
from autoglm_elastic.ports import StreamBlobs
from autoglm_elastic.snapshot.scatter import Job, Scatter, Target

READ_S: Final = 3600.0
"""Bound of one load's reading, whatever its size: a disk that hangs longer than this is broken."""
_RUN_BYTES: Final = 8 << 20
_RUN_JOBS: Final = 2048
"""A thread takes at most this much at a time, or one chunk."""
_THREAD_BYTES_MIN: Final = 64 << 20
"""Less than this does not keep a thread busy."""


def read_tensors(
    blobs: StreamBlobs, manifest: Manifest, targets: Sequence[Target], *, rank: int = 0, world_size: int = 1
) -> int:
    """Fills every target. Returns the bytes read. Raises CorruptSnapshot for the first chunk that does not
    verify; targets are partly overwritten then.

    Args:
        rank, world_size: of the reader; only say where to look first.
    """
    with OpenPacks(blobs, manifest) as opened, torch.no_grad():
        return read_jobs(opened, find_jobs(opened, manifest, targets, rank, world_size))


def read_jobs(opened: OpenPacks, jobs: Sequence[Job]) -> int:
    """Fills what the jobs name; called without gradients. Returns the bytes read. Raises CorruptSnapshot,
    PlatformError."""
    runs = list(_runs(jobs))
    nbytes = sum(job.chunk.nbytes for job in jobs)
    few = max(1, nbytes // _THREAD_BYTES_MIN)
    threads = min(limits.READ_THREADS_MAX, len(os.sched_getaffinity(0)), len(runs), few)
    if threads < 2:
        scatter = Scatter()
        for run in runs:
            scatter.run(opened.reader(run[0].chunk.pack), run)
    else:
        _run_all(opened, runs, threads)
    return nbytes


class _Wanted:
    """One target, and what was found of it."""

    __slots__ = ("found", "missing", "target")

    def __init__(self, target: Target) -> None:
        self.target = target
        self.missing = math.prod(target.box[1])
        self.found: list[Box] = []

    def take(self, common: Box) -> None:
        inside = tuple(a - b for a, b in zip(common[0], self.target.box[0], strict=True))
        self.found.append((inside, common[1]))
        self.missing -= math.prod(common[1])


def find_jobs(
    opened: OpenPacks, manifest: Manifest, targets: Iterable[Target], rank: int, world_size: int
) -> list[Job]:
    """By pack and position. Raises CorruptSnapshot where the chunks do not cover a target exactly once."""
    wanted: dict[str, list[_Wanted]] = {}
    for target in targets:
        wanted.setdefault(target.name, []).append(_Wanted(target))
    unfilled = sum(item.missing > 0 for group in wanted.values() for item in group)
    jobs = []
    for number in _likely_first(manifest, rank, world_size):
        if not unfilled:
            break
        for name, chunks in opened.chunks(number).items():
            group = wanted.get(name, ())
            if not group or not any(item.missing for item in group):
                continue
            for chunk in chunks:
                box = (chunk.offsets, chunk.sizes)
                pieces = []
                for item in group:
                    common = box if box == item.target.box else overlap(item.target.box, box)
                    if common:
                        pieces.append((item.target, common))
                        item.take(common)
                        unfilled -= item.missing == 0
                if pieces:
                    jobs.append(Job(name, manifest.tensors[name].dtype, chunk, tuple(pieces)))
    for name, group in wanted.items():
        for item in group:
            problem = cover_problem(item.target.box[1], item.found)
            if problem:
                raise CorruptSnapshot(f"tensor {name}: {problem}")
    return sorted(jobs, key=lambda job: (job.chunk.pack, job.chunk.begin))


def _likely_first(manifest: Manifest, rank: int, world_size: int) -> list[int]:
    """Numbers of the packs: first those of the ranks that stood where this one stands, in proportion."""
    place = (rank + 0.5) * manifest.world_size / world_size - 0.5
    return sorted(range(len(manifest.packs)), key=lambda number: abs(manifest.packs[number].rank - place))


def _runs(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs that follow each other in a pack without a gap, in pieces of a size that spreads over threads."""
    run: list[Job] = []
    nbytes = 0
    for job in jobs:
        if run:
            last = run[-1].chunk
            follows = (job.chunk.pack, job.chunk.begin) == (last.pack, last.begin + last.nbytes)
            if not follows or nbytes + job.chunk.nbytes > _RUN_BYTES or len(run) >= _RUN_JOBS:
                yield run
                run, nbytes = [], 0
        run.append(job)
        nbytes += job.chunk.nbytes
    if run:
        yield run


def _run_all(opened: OpenPacks, runs: Sequence[list[Job]], threads: int) -> None:
    stop = threading.Event()
    cursor = iter(runs)
    lock = threading.Lock()

    def work() -> None:
        scatter = Scatter()
        try:
            with torch.no_grad():
                while not stop.is_set():
                    with lock:
                        run = next(cursor, None)
                    if run is None:
                        return
                    scatter.run(opened.reader(run[0].chunk.pack), run)
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
