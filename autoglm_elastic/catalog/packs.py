"""Packs: valid safetensors files in which every entry is one chunk. Planning and reading of their headers.

A pack is planned before its data exist, since sizes are known: the header is laid out with room for the
digests of its chunks, the data begin at a multiple of ALIGNMENT (so that they can be written past the page
cache), and the digests are filled in when the data were hashed. The file is named by the SHA-256 of its
header, which holds the SHA-256 of every chunk: the name vouches for every byte, and the bytes are hashed
once, in parallel.

No two packs have the same name, even with the same data, since the header holds a random number: a snapshot that
is taken back can never take a file that another one counts on."""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec
import xxhash

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.dtypes import BY_NAME, DType
from autoglm_elastic.catalog.format import Box, Chunk, Tensor, chunk_entry, chunk_nbytes
from autoglm_elastic.errors import CorruptSnapshot, UsageError, in_one_line
from autoglm_elastic.ports import BlobReader

ALIGNMENT: Final = 4096
"""Of the data in the file; a page and the block of every disk."""
DIGEST_CHARS: Final = 32 + 64
"""One chunk's xxh3_128 and SHA-256 in hexadecimal, in the header's `digests`."""
_LENGTH: Final = struct.Struct("<Q")
_KIND: Final = f"pack {limits.FORMAT_VERSION}"
_DIGESTS_KEY: Final = b'"digests":"'
_NONCE_CHARS: Final = 32
_NONCE_BEFORE: Final = _NONCE_CHARS + len(b'",') + len(_DIGESTS_KEY)
"""So far before the digests the nonce begins."""
DIGESTS_AT_MIN: Final = _LENGTH.size + _NONCE_BEFORE
_METADATA: Final = "__metadata__"


class Boxed(Protocol):
    """What a pack holds: a box of a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def box(self) -> Box: ...
    @property
    def nbytes(self) -> int: ...


P = TypeVar("P", bound=Boxed)


@dataclass(frozen=True, slots=True)
class PackPlan(Generic[P]):
    """`parts[i]` lies at `starts[i]` of the data, which begin behind `head` (length word, JSON, padding). The
    digests go to `digests_at` of the head, in the order of the parts."""

    head: bytes
    digests_at: int
    parts: tuple[P, ...]
    starts: tuple[int, ...]
    nbytes: int


def stored_shape(dtype: DType, sizes: Sequence[int]) -> list[int]:
    return [*sizes, dtype.parts] if dtype.parts > 1 else list(sizes)


def plan_packs(parts: Iterable[P]) -> list[PackPlan[P]]:
    """Parts ordered by element size, so that each is aligned to it, in packs of about PACK_BYTES."""
    plans: list[PackPlan[P]] = []
    group: list[P] = []
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


def _plan(parts: Sequence[P]) -> PackPlan[P]:
    digests = "0" * (DIGEST_CHARS * len(parts))
    nonce = "0" * _NONCE_CHARS
    metadata = {"format": "pt", "autoglm": _KIND, "nonce": nonce, "digests": digests}
    header: dict[str, Any] = {_METADATA: metadata}
    starts = []
    at = 0
    for part in parts:
        entry = chunk_entry(part.name, part.shape, *part.box)
        if entry in header:
            raise UsageError(f"tensor name {part.name[:80]!r} is used for a part of another tensor")
        shape = stored_shape(part.dtype, part.box[1])
        header[entry] = {"dtype": part.dtype.stored, "shape": shape, "data_offsets": [at, at + part.nbytes]}
        starts.append(at)
        at += part.nbytes
    text = msgspec.json.encode(header)
    digests_at = _LENGTH.size + text.index(_DIGESTS_KEY) + len(_DIGESTS_KEY)
    text += b" " * (-(len(text) + _LENGTH.size) % ALIGNMENT)
    if len(text) > limits.HEADER_BYTES_MAX:
        raise UsageError(f"a pack header of {len(text)} bytes", valid=f"at most {limits.HEADER_BYTES_MAX}")
    return PackPlan(_LENGTH.pack(len(text)) + text, digests_at, tuple(parts), tuple(starts), at)


def chunk_digest(data: memoryview) -> bytes:
    """One chunk's place in `digests`."""
    text = xxhash.xxh3_128_hexdigest(data) + hashlib.sha256(data).hexdigest()
    return text.encode()


def fill(head: bytes, digests_at: int, digests: bytes) -> tuple[bytes, str]:
    """The head with a nonce and its digests, and the name (SHA-256) that the pack gets by it: a new one at every
    call."""
    filled = bytearray(head)
    nonce_at = digests_at - _NONCE_BEFORE
    filled[nonce_at : nonce_at + _NONCE_CHARS] = secrets.token_hex(_NONCE_CHARS // 2).encode()
    filled[digests_at : digests_at + len(digests)] = digests
    return bytes(filled), hashlib.sha256(filled).hexdigest()


Digest = xxhash.xxh3_128
"""A chunk's fast digest, block by block."""


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """An entry of a header, or its metadata; which fields are there is checked."""

    format: str | None = None
    autoglm: str | None = None
    nonce: str | None = None
    digests: str | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    data_offsets: tuple[int, int] | None = None


_ROWS: Final = msgspec.json.Decoder(dict[str, _Row], strict=True)


class HeaderRow(msgspec.Struct, frozen=True, gc=False):
    """One entry of a pack's header; `begin` counts from the start of the file."""

    name: str
    stored: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    xxh3: str
    sha256: str


def read_head(reader: BlobReader, where: str) -> bytes:
    """Length word, JSON and padding, as they are in the file. Raises CorruptSnapshot."""
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
    return bytes(word + text)


def parse_head(head: bytes, file_nbytes: int, where: str) -> list[HeaderRow]:
    """The rows in the order of their data, which fill the file without a hole. Raises CorruptSnapshot."""
    text = head[_LENGTH.size :].rstrip(b" ")
    try:
        decoded = _ROWS.decode(text)
        if msgspec.json.encode(decoded) != text:
            raise ValueError("it is not canonical, or a key appears twice")
        rows = _rows(decoded, len(head))
    except (msgspec.MsgspecError, ValueError, KeyError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptSnapshot(f"{where} has a malformed header: {in_one_line(error)[:160]}") from error
    at = len(head)
    for row in rows:
        if row.begin != at:
            raise CorruptSnapshot(f"{where}: entry {row.name[:80]!r} overlaps another or leaves a hole")
        at += row.nbytes
    if at != file_nbytes:
        raise CorruptSnapshot(f"{where} has {file_nbytes} bytes, its header says {at}")
    return rows


_STORED_NBYTES: Final = {dtype.stored: dtype.nbytes // dtype.parts for dtype in BY_NAME.values()}


def _rows(header: dict[str, _Row], base: int) -> list[HeaderRow]:
    metadata = header.pop(_METADATA, None)
    if (
        metadata is None
        or metadata.autoglm != _KIND
        or metadata.digests is None
        or len(metadata.nonce or "") != _NONCE_CHARS
        or metadata.shape is not None
    ):
        raise ValueError("its metadata are not those of a pack")
    digests = metadata.digests
    if len(digests) != DIGEST_CHARS * len(header) or not digests.isascii():
        raise ValueError("it has another number of digests than of entries")
    rows = []
    at = 0
    for name, row in header.items():
        if row.dtype is None or row.shape is None or row.data_offsets is None or row.autoglm is not None:
            raise ValueError(f"entry {name[:80]!r} has the wrong fields")
        begin, end = row.data_offsets
        numbers = (begin, end, *row.shape)
        if min(numbers) < 0 or max(numbers) > limits.SIZE_MAX:
            raise ValueError(f"entry {name[:80]!r} has no sane numbers")
        nbytes = _STORED_NBYTES[row.dtype]
        for extent in row.shape:
            nbytes *= extent
        if len(row.shape) > limits.DIMS_MAX + 1 or nbytes != end - begin:
            raise ValueError(f"entry {name[:80]!r} does not span what its shape needs")
        xxh3, sha256 = digests[at : at + 32], digests[at + 32 : at + DIGEST_CHARS]
        at += DIGEST_CHARS
        rows.append(HeaderRow(name, row.dtype, row.shape, base + begin, nbytes, xxh3, sha256))
    return rows


_PLAIN: Final = {dtype.stored: dtype.name for dtype in BY_NAME.values() if dtype.parts == 1}
"""The usual type behind each stored one: what most rows are."""


def chunks_of(
    rows: Iterable[HeaderRow], tensors: Mapping[str, Tensor], pack: int, where: str
) -> dict[str, list[Chunk]]:
    """The chunks that a pack's rows are, by tensor. Raises CorruptSnapshot for a row that fits no tensor."""
    found: dict[str, list[Chunk]] = {}
    for row in rows:
        whole = tensors.get(row.name)
        if whole is not None and (whole.dtype, whole.shape) == (_PLAIN.get(row.stored), row.shape):
            offsets = (0,) * len(row.shape)
            chunk = Chunk(offsets, row.shape, pack, row.begin, row.nbytes, row.xxh3, row.sha256)
            found.setdefault(row.name, []).append(chunk)
            continue
        name, tensor, offsets = _owner(row, tensors, where)
        dtype = BY_NAME[tensor.dtype]
        sizes = row.shape[:-1] if dtype.parts > 1 else row.shape
        fits = (
            row.stored == dtype.stored
            and (dtype.parts == 1 or row.shape[-1:] == (dtype.parts,))
            and len(sizes) == len(offsets) == len(tensor.shape)
            and row.nbytes == chunk_nbytes(tensor.dtype, sizes)
            and all(
                offset + size <= extent
                for offset, size, extent in zip(offsets, sizes, tensor.shape, strict=True)
            )
        )
        if not fits:
            raise CorruptSnapshot(f"{where}: entry {row.name[:80]!r} does not fit tensor {name[:80]!r}")
        chunk = Chunk(offsets, sizes, pack, row.begin, row.nbytes, row.xxh3, row.sha256)
        found.setdefault(name, []).append(chunk)
    return found


def _owner(row: HeaderRow, tensors: Mapping[str, Tensor], where: str) -> tuple[str, Tensor, tuple[int, ...]]:
    tensor = tensors.get(row.name)
    if tensor is not None:
        return row.name, tensor, (0,) * len(tensor.shape)
    name, _, place = row.name.rpartition("@")
    tensor = tensors.get(name)
    parts = place.split(",")
    if tensor is None or not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts):
        raise CorruptSnapshot(f"{where}: entry {row.name[:80]!r} belongs to no tensor")
    return name, tensor, tuple(map(int, parts))
