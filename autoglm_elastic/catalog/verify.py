"""Checking every byte of a snapshot without loading it: which tensor of which pack is corrupt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import limits, packs
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.opened import OpenPacks
from autoglm_elastic.errors import ElasticError
from autoglm_elastic.ports import BlobReader, StreamBlobs

_BLOCK_BYTES: Final = 4 << 20
_BATCH: Final = 256
"""Chunks given to the threads at once."""

OnBytes = Callable[[int], None]


def unwatched(nbytes: int) -> None:
    """Shows no progress."""


@dataclass(frozen=True, slots=True)
class Problem:
    """`file`: in the run directory. `tensor` is "" when the damage is not inside of one."""

    file: str
    tensor: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.file}: tensor {self.tensor}: {self.reason}"
            if self.tensor
            else f"{self.file}: {self.reason}"
        )


def _problem(file: str, tensor: str, error: ElasticError) -> Problem:
    return Problem(file, tensor, str(error).removeprefix(f"{file}: "))


def verify(
    blobs: StreamBlobs,
    catalog: Catalog,
    entry: fmt.CatalogEntry,
    *,
    part: tuple[int, int] = (0, 1),
    on_bytes: OnBytes = unwatched,
) -> list[Problem]:
    """Everything that is wrong with a snapshot; empty when every byte is right. Raises nothing but bugs.

    Args:
        part: (this one, how many): several processes read a part of the bytes each. Whether everything is there is
            checked in the first.
        on_bytes: called with the number of bytes that were just checked, from one thread at a time. What it raises
            ends the check.
    """
    try:
        manifest = catalog.manifest(entry)
    except ElasticError as error:
        return [_problem(fmt.manifest_path(entry.manifest), "", error)]
    problems = []
    if sum(pack.nbytes for pack in manifest.packs) != entry.nbytes:
        problems.append(Problem(fmt.entry_path(entry.name), "", "its size differs from the manifest's"))
    boxes: dict[str, list[fmt.Box]] = {name: [] for name in manifest.tensors}
    with (
        OpenPacks(blobs, manifest) as opened,
        ThreadPoolExecutor(limits.READ_THREADS_MAX, thread_name_prefix="autoglm-verify") as pool,
    ):
        for batch in _batches(_part_of(part, opened, manifest, boxes, problems)):
            for job, problem in zip(batch, pool.map(partial(_check, opened), batch), strict=True):
                on_bytes(job.chunk.nbytes)
                if problem is not None:
                    problems.append(problem)
    if not problems and part[0] == 0:
        for name, tensor in manifest.tensors.items():
            wrong = fmt.cover_problem(tensor.shape, boxes[name])
            if wrong:
                problems.append(Problem(fmt.manifest_path(entry.manifest), name, wrong))
    return problems


@dataclass(frozen=True, slots=True)
class _Job:
    number: int
    tensor: str
    chunk: fmt.Chunk


def _part_of(
    part: tuple[int, int],
    opened: OpenPacks,
    manifest: fmt.Manifest,
    boxes: dict[str, list[fmt.Box]],
    problems: list[Problem],
) -> Iterator[_Job]:
    """Whole packs where there are enough of them, so that nobody but the first part reads every header."""
    this, parts = part
    by_pack = len(manifest.packs) >= parts
    numbers = [n for n in range(len(manifest.packs)) if this == 0 or not by_pack or n % parts == this]
    for index, job in enumerate(_chunks(numbers, opened, manifest, boxes, problems)):
        if (job.number if by_pack else index) % parts == this:
            yield job


def _chunks(
    numbers: Iterable[int],
    opened: OpenPacks,
    manifest: fmt.Manifest,
    boxes: dict[str, list[fmt.Box]],
    problems: list[Problem],
) -> Iterator[_Job]:
    """Every chunk of these packs in the order of the files; a pack whose header is damaged is a problem instead."""
    for number in numbers:
        pack = manifest.packs[number]
        try:
            chunks = opened.chunks(number)
        except ElasticError as error:
            problems.append(_problem(fmt.pack_path(pack.sha256), "", error))
            continue
        for name, some in chunks.items():
            boxes[name].extend((chunk.offsets, chunk.sizes) for chunk in some)
            yield from (_Job(number, name, chunk) for chunk in some)


def _batches(jobs: Iterator[_Job]) -> Iterator[list[_Job]]:
    while batch := list(islice(jobs, _BATCH)):
        yield batch


def _check(opened: OpenPacks, job: _Job) -> Problem | None:
    path = fmt.pack_path(opened.pack(job.number).sha256)
    try:
        right = _digests(opened.reader(job.number), job.chunk) == (job.chunk.xxh3, job.chunk.sha256)
    except ElasticError as error:
        return _problem(path, job.tensor, error)
    if right:
        return None
    return Problem(path, job.tensor, f"the digest of its chunk at {list(job.chunk.offsets)} differs")


def _digests(reader: BlobReader, chunk: fmt.Chunk) -> tuple[str, str]:
    fast, strong = packs.Digest(), hashlib.sha256()
    for block in _blocks(reader, chunk.begin, chunk.nbytes):
        fast.update(block)
        strong.update(block)
    return fast.hexdigest(), strong.hexdigest()


def _blocks(reader: BlobReader, begin: int, nbytes: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(nbytes, _BLOCK_BYTES)))
    for at in range(0, nbytes, _BLOCK_BYTES):
        block = buffer[: min(_BLOCK_BYTES, nbytes - at)]
        reader.read_into(begin + at, block)
        yield block
