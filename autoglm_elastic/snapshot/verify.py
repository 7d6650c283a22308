"""Checking every byte of a snapshot without loading it: which tensor of which pack is corrupt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from autoglm_elastic.errors import ElasticError
from autoglm_elastic.ports import BlobReader, StreamBlobs
from autoglm_elastic.snapshot import format as fmt
from autoglm_elastic.snapshot import packs
from autoglm_elastic.snapshot.catalog import Catalog
from autoglm_elastic.snapshot.dtypes import BY_NAME

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
    chunks: list[list[tuple[str, fmt.Tensor, fmt.Chunk]]] = [[] for _ in manifest.packs]
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            chunks[chunk.pack].append((name, tensor, chunk))
    for pack, inside in zip(manifest.packs, chunks, strict=True):
        problems.extend(_verify_pack(blobs, pack, inside))
    return problems


def _verify_pack(
    blobs: StreamBlobs, pack: fmt.Pack, chunks: list[tuple[str, fmt.Tensor, fmt.Chunk]]
) -> Iterator[Problem]:
    path = fmt.pack_path(pack.sha256)
    try:
        reader = blobs.open(path)
    except FileNotFoundError:
        yield Problem(path, "", "it is missing")
        return
    except ElasticError as error:
        yield Problem(path, "", str(error))
        return
    try:
        if reader.nbytes != pack.nbytes:
            yield Problem(path, "", f"it has {reader.nbytes} bytes instead of {pack.nbytes}")
            return
        found = list(_wrong_chunks(reader, path, chunks))
        yield from found
        if not found and _sha256(reader) != pack.sha256:
            yield Problem(path, "", "its SHA-256 differs from its name")
    except ElasticError as error:
        yield Problem(path, "", str(error))
    finally:
        reader.close()


def _wrong_chunks(
    reader: BlobReader, path: str, chunks: list[tuple[str, fmt.Tensor, fmt.Chunk]]
) -> Iterator[Problem]:
    try:
        rows = {row.begin: row for row in packs.read_header(reader, path) if row.nbytes}
    except ElasticError as error:
        yield Problem(path, "", str(error))
        rows = None
    for name, tensor, chunk in sorted(chunks, key=lambda item: item[2].begin):
        dtype = BY_NAME[tensor.dtype]
        nbytes = fmt.chunk_nbytes(tensor.dtype, chunk.sizes)
        row = rows.get(chunk.begin) if rows is not None else None
        shape = tuple(packs.stored_shape(dtype, chunk.sizes))
        if rows is not None and nbytes and (row is None or (row.stored, row.shape) != (dtype.stored, shape)):
            yield Problem(path, name, "the pack's header describes it otherwise")
        hasher = packs.Digest()
        for block in _blocks(reader, chunk.begin, nbytes):
            hasher.update(block)
        if hasher.hexdigest() != chunk.xxh3:
            yield Problem(path, name, f"the digest of its chunk at {list(chunk.offsets)} differs")


def _sha256(reader: BlobReader) -> str:
    hasher = hashlib.sha256()
    for block in _blocks(reader, 0, reader.nbytes):
        hasher.update(block)
    return hasher.hexdigest()


def _blocks(reader: BlobReader, begin: int, nbytes: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(nbytes, _BLOCK_BYTES)))
    for at in range(0, nbytes, _BLOCK_BYTES):
        block = buffer[: min(_BLOCK_BYTES, nbytes - at)]
        reader.read_into(begin + at, block)
        yield block
