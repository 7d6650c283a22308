"""Packs: valid safetensors files in which every entry is one chunk.

A pack is planned before its data exist (sizes are known), so its header is written first and the data as one
sequential stream; digests are computed meanwhile in a second thread (hashing releases the GIL). The file is
named by its SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import xxhash

from autoglm_elastic.errors import CorruptSnapshot, ElasticError, UsageError
from autoglm_elastic.ports import BlobReader, StreamBlobs
from autoglm_elastic.snapshot import limits
from autoglm_elastic.snapshot.dtypes import BY_NAME, DType
from autoglm_elastic.snapshot.format import Box, Chunk, Pack, chunk_entry, pack_path
from autoglm_elastic.snapshot.layout import Part
from autoglm_elastic.storage import SyncFailed

WRITE_ATTEMPTS: Final = 2
"""A pack whose fsync failed is written anew under another name, once."""
_LENGTH: Final = struct.Struct("<Q")
_METADATA: Final = {"format": "pt", "autoglm": f"pack {limits.FORMAT_VERSION}"}
_HASH_IN_THREAD_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class PackPlan:
    """`parts[i]` lies at `starts[i]` of the data, which begin behind `head` (length word and header)."""

    head: bytes
    parts: tuple[Part, ...]
    starts: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """`chunks[i]` belongs to `plan.parts[i]`, numbered as if its pack were number 0. `created`: it was not
    there."""

    pack: Pack
    chunks: tuple[Chunk, ...]
    created: bool


def stored_shape(dtype: DType, sizes: Sequence[int]) -> list[int]:
    return [*sizes, dtype.parts] if dtype.parts > 1 else list(sizes)


def plan_packs(parts: Iterable[Part]) -> list[PackPlan]:
    """Parts ordered by element size, so that each is aligned to it, in packs of about PACK_BYTES."""
    plans: list[PackPlan] = []
    group: list[Part] = []
    nbytes = 0
    for part in sorted(parts, key=lambda part: -part.dtype.nbytes):
        if group and (nbytes + part.nbytes > limits.PACK_BYTES or len(group) >= limits.PACK_CHUNKS_MAX):
            plans.append(_plan(group))
            group, nbytes = [], 0
        group.append(part)
        nbytes += part.nbytes
    if group:
        plans.append(_plan(group))
    return plans


def _plan(parts: Sequence[Part]) -> PackPlan:
    header: dict[str, Any] = {"__metadata__": _METADATA}
    starts = []
    at = 0
    for part in parts:
        entry = chunk_entry(part.name, part.shape, *part.box)
        if entry in header:
            raise UsageError(f"tensor name {part.name[:80]!r} is used for a part of another tensor")
        header[entry] = _header_row(part.dtype, part.box, at)
        starts.append(at)
        at += part.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH.size) % 8)
    if len(text) > limits.HEADER_BYTES_MAX:
        raise UsageError(f"a pack header of {len(text)} bytes", valid=f"at most {limits.HEADER_BYTES_MAX}")
    return PackPlan(_LENGTH.pack(len(text)) + text, tuple(parts), tuple(starts), at)


def _header_row(dtype: DType, box: Box, at: int) -> dict[str, Any]:
    nbytes = dtype.nbytes
    for size in box[1]:
        nbytes *= size
    return {"dtype": dtype.stored, "shape": stored_shape(dtype, box[1]), "data_offsets": [at, at + nbytes]}


def write_pack(blobs: StreamBlobs, plan: PackPlan, data: memoryview) -> Written:
    """Durable under its content name when this returns. Raises ElasticError; nothing is left behind then."""
    for attempt in range(1, WRITE_ATTEMPTS + 1):
        try:
            return _write_once(blobs, plan, data)
        except SyncFailed:
            if attempt == WRITE_ATTEMPTS:
                raise
    raise UsageError("no attempt was made to write a pack")


def _write_once(blobs: StreamBlobs, plan: PackPlan, data: memoryview) -> Written:
    pending = blobs.create()
    try:
        if plan.nbytes < _HASH_IN_THREAD_BYTES:
            pending.write(plan.head)
            pending.write(data)
            sha256, digests = _digests(plan, data)
        else:
            with ThreadPoolExecutor(1, thread_name_prefix="autoglm-hash") as pool:
                hashing = pool.submit(_digests, plan, data)
                pending.write(plan.head)
                pending.write(data)
                sha256, digests = hashing.result(timeout=limits.VOTE_S)
        name = pack_path(sha256)
        created = not exists(blobs, name)
    except BaseException:
        pending.discard()
        raise
    try:
        pending.publish(name)
    except ElasticError:
        if created:
            remove(blobs, [name])
        raise
    base = len(plan.head)
    chunks = tuple(
        Chunk(part.box[0], part.box[1], 0, base + start, digest)
        for part, start, digest in zip(plan.parts, plan.starts, digests, strict=True)
    )
    return Written(Pack(sha256, base + plan.nbytes), chunks, created)


def remove(blobs: StreamBlobs, names: Iterable[str]) -> None:
    """What cannot be removed stays, as garbage that nothing names."""
    for name in names:
        with contextlib.suppress(ElasticError):
            blobs.delete(name)


def exists(blobs: StreamBlobs, name: str) -> bool:
    try:
        blobs.size(name)
    except FileNotFoundError:
        return False
    return True


def _digests(plan: PackPlan, data: memoryview) -> tuple[str, list[str]]:
    whole = hashlib.sha256(plan.head)
    whole.update(data)
    return whole.hexdigest(), [
        digest(data[start : start + part.nbytes]) for part, start in zip(plan.parts, plan.starts, strict=True)
    ]


Digest = xxhash.xxh3_128
"""The same, block by block."""


def digest(data: memoryview) -> str:
    """xxh3_128 in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True, slots=True)
class HeaderRow:
    """One entry of a pack's header; `begin` counts from the start of the file."""

    name: str
    stored: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def read_header(reader: BlobReader, where: str) -> list[HeaderRow]:
    """The header's rows by position; they fill the file without a hole. Raises CorruptSnapshot."""
    if reader.nbytes < _LENGTH.size:
        raise CorruptSnapshot(f"{where} has only {reader.nbytes} bytes")
    word = bytearray(_LENGTH.size)
    reader.read_into(0, memoryview(word))
    (length,) = _LENGTH.unpack(word)
    if not 2 <= length <= min(limits.HEADER_BYTES_MAX, reader.nbytes - _LENGTH.size) or length % 8:
        raise CorruptSnapshot(
            f"{where} has a header of {length} bytes", valid=f"at most {limits.HEADER_BYTES_MAX}"
        )
    text = bytearray(length)
    reader.read_into(_LENGTH.size, memoryview(text))
    try:
        header = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
        rows = sorted(_rows(header, _LENGTH.size + length), key=lambda row: (row.begin, row.nbytes))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptSnapshot(f"{where} has a malformed header: {str(error)[:160]}") from error
    at = _LENGTH.size + length
    for row in rows:
        if row.begin != at:
            raise CorruptSnapshot(f"{where}: entry {row.name[:80]!r} overlaps another or leaves a hole")
        at += row.nbytes
    if at != reader.nbytes:
        raise CorruptSnapshot(f"{where} has {reader.nbytes} bytes, its header says {at}")
    return rows


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


_STORED_NBYTES: Final = {dtype.stored: dtype.nbytes // dtype.parts for dtype in BY_NAME.values()}


def _rows(header: dict[str, Any], base: int) -> Iterator[HeaderRow]:
    for name, row in header.items():
        if name == "__metadata__":
            continue
        if set(row) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"entry {name[:80]!r} has the wrong fields")
        begin, end = row["data_offsets"]
        shape = tuple(row["shape"])
        numbers = (begin, end, *shape)
        if any(type(number) is not int or not 0 <= number <= limits.SIZE_MAX for number in numbers):
            raise ValueError(f"entry {name[:80]!r} has no sane numbers")
        nbytes = _STORED_NBYTES[row["dtype"]]
        for extent in shape:
            nbytes *= extent
        if len(shape) > limits.DIMS_MAX + 1 or nbytes != end - begin:
            raise ValueError(f"entry {name[:80]!r} does not span what its shape needs")
        yield HeaderRow(name, row["dtype"], shape, base + begin, nbytes)
