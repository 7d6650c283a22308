"""Checking every byte of a snapshot without loading it: which tensor of which pack is corrupt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import packs
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.opened import OpenPacks
from autoglm_elastic.errors import ElasticError
from autoglm_elastic.ports import BlobReader, StreamBlobs

_BLOCK_BYTES: Final = 8 << 20


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


def verify(blobs: StreamBlobs, catalog: Catalog, entry: fmt.CatalogEntry) -> list[Problem]:
    """Everything that is wrong with a snapshot; empty when every byte is right. Raises nothing but bugs."""
    try:
        manifest = catalog.manifest(entry)
    except ElasticError as error:
        return [Problem(fmt.manifest_path(entry.manifest), "", str(error))]
    problems = []
    if sum(pack.nbytes for pack in manifest.packs) != entry.nbytes:
        problems.append(Problem(fmt.entry_path(entry.name), "", "its size differs from the manifest's"))
    boxes: dict[str, list[fmt.Box]] = {name: [] for name in manifest.tensors}
    with OpenPacks(blobs, manifest) as opened:
        for number, pack in enumerate(manifest.packs):
            problems.extend(_verify_pack(opened, number, fmt.pack_path(pack.sha256), boxes))
    if not problems:
        for name, tensor in manifest.tensors.items():
            wrong = fmt.cover_problem(tensor.shape, boxes[name])
            if wrong:
                problems.append(Problem(fmt.manifest_path(entry.manifest), name, wrong))
    return problems


def _verify_pack(
    opened: OpenPacks, number: int, path: str, boxes: dict[str, list[fmt.Box]]
) -> Iterator[Problem]:
    try:
        chunks = opened.chunks(number)
        reader = opened.reader(number)
        for name, some in chunks.items():
            for chunk in some:
                boxes[name].append((chunk.offsets, chunk.sizes))
                if _digests(reader, chunk) != (chunk.xxh3, chunk.sha256):
                    yield Problem(path, name, f"the digest of its chunk at {list(chunk.offsets)} differs")
    except ElasticError as error:
        yield Problem(path, "", str(error))


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
