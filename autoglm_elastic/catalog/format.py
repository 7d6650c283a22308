"""What lies in a run directory: catalog entries, generation records, manifests. Schemas, canonical JSON,
checks.

Every document is canonical JSON (keys sorted, no spaces, no duplicate): decoding re-encodes and compares, so
that two readers can never see two meanings. Reading never trusts: sizes are capped before anything is
allocated. Pure: no I/O here. docs/format.md says the same in prose."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeVar

import msgspec

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.dtypes import BY_NAME
from autoglm_elastic.core.lineage import GenerationRecord, entry_name, parse_entry_name
from autoglm_elastic.errors import CorruptSnapshot, UsageError, in_one_line

CATALOG_DIR: Final = "catalog"
MANIFEST_DIR: Final = "manifests"
PACK_DIR: Final = "packs"
GENERATION_DIR: Final = "generations"
HEAD_NAME: Final = "HEAD"
LATEST_NAME: Final = "latest"

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """A box of one tensor, contiguous in row-major order at `begin` (bytes, in the file) of pack number
    `pack`. Not stored as such: a pack's header lists its chunks (packs.py)."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    pack: int
    begin: int
    nbytes: int
    xxh3: str
    sha256: str


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """`dtype`: torch's name. `shape`: of the whole tensor."""

    dtype: str
    shape: tuple[int, ...]


class Pack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file. `sha256`: of its header, which holds the digests of its chunks. `head`: the header's bytes with
    its length word, where the data begin. `rank`: which rank wrote it; a hint where to look first."""

    sha256: str
    nbytes: int
    head: int
    rank: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One snapshot. `tree` is the state's own structure (catalog/tree.py), in which tensors are named."""

    format: str
    version: int
    step: int
    generation: int
    world_size: int
    packs: tuple[Pack, ...]
    tensors: dict[str, Tensor]
    tree: Any
    environment: dict[str, str]
    config_digest: str | None = None


class Structure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one rank knows of the state: its tensors and its tree."""

    tensors: dict[str, Tensor]
    tree: Any


class Prepared(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one rank contributes, in a size that does not depend on the number of tensors. `structure`: digest
    of its Structure without the values in the tree. `cover`: see cover(). `since`: no pack was durable before, in
    seconds of the storage's clock (ports.AgingBlobs.now); None without packs, or where the storage has no clock."""

    packs: tuple[Pack, ...]
    structure: str
    cover: int
    since: float | None = None


class Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A document that nothing else names by its digest carries its own: the SHA-256 of itself with `digest`
    empty."""

    digest: str = ""


class CatalogEntry(Sealed, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One committed snapshot. `manifest`: SHA-256. `nbytes`: of the packs. `wall_time`: seconds since the
    epoch."""

    format: str
    version: int
    name: str
    step: int
    generation: int
    manifest: str
    manifest_bytes: int
    kind: str
    nbytes: int
    tensors: int
    world_size: int
    wall_time: float
    parent: str | None = None
    metrics: dict[str, float] = {}
    tags: tuple[str, ...] = ()
    config_digest: str | None = None


class GenerationFile(Sealed, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """core.lineage.GenerationRecord as stored."""

    number: int
    parent: int
    resumed_step: int
    resumed_entry: str | None
    resumed_tier: str


T = TypeVar("T")
_encoder = msgspec.json.Encoder(order="sorted")


def encode(document: msgspec.Struct) -> bytes:
    """Canonical JSON."""
    return _encoder.encode(document)


S = TypeVar("S", bound=Sealed)


def sealed(document: S) -> S:
    """The document with its digest."""
    bare = msgspec.structs.replace(document, digest="")
    return msgspec.structs.replace(bare, digest=hashlib.sha256(encode(bare)).hexdigest())


def _check_seal(document: Sealed, where: str) -> None:
    if document.digest != sealed(document).digest:
        raise CorruptSnapshot(f"{where}: its digest differs")


def decode(data: bytes, kind: type[T], where: str) -> T:
    """Strict. Raises CorruptSnapshot naming `where`."""
    try:
        value = msgspec.json.decode(data, type=kind, strict=True)
        canonical = _encoder.encode(value)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise CorruptSnapshot(f"{where} does not decode: {in_one_line(error)[:200]}") from error
    if canonical != data:
        raise CorruptSnapshot(f"{where} is not canonical JSON", valid="sorted keys, each once, no spaces")
    return value


def entry_path(name: str) -> str:
    return f"{CATALOG_DIR}/{name}.json"


def manifest_path(sha256: str) -> str:
    return f"{MANIFEST_DIR}/{sha256}.json"


def pack_path(sha256: str) -> str:
    return f"{PACK_DIR}/{sha256[:2]}/{sha256}.safetensors"


def generation_path(number: int) -> str:
    return f"{GENERATION_DIR}/{number}.json"


def chunk_entry(tensor: str, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> str:
    """The name of a chunk in its pack's header: the tensor's own, with the place of a part behind an "@"."""
    if tuple(sizes) == tuple(shape):
        return tensor
    return f"{tensor}@{','.join(map(str, offsets))}"


def chunk_nbytes(dtype: str, sizes: Sequence[int]) -> int:
    return math.prod(sizes) * BY_NAME[dtype].nbytes


def parse_entry(data: bytes, name: str, where: str) -> CatalogEntry:
    """The catalog entry of that name. Raises CorruptSnapshot; UsageError for a newer format."""
    entry = decode(data, CatalogEntry, where)
    _check_seal(entry, where)
    _check_version(entry.format, entry.version, where)
    good = (
        0 <= entry.step <= limits.SIZE_MAX
        and 0 <= entry.generation <= limits.SIZE_MAX
        and entry.name == name == entry_name(entry.step, entry.generation)
        and _SHA256.fullmatch(entry.manifest)
        and 0 < entry.manifest_bytes <= limits.MANIFEST_BYTES_MAX
        and 0 <= entry.nbytes <= limits.SIZE_MAX
        and math.isfinite(entry.wall_time)
    )
    if not good:
        raise CorruptSnapshot(f"{where} contradicts itself or its name")
    return entry


def parse_generation(data: bytes, number: int, where: str) -> GenerationRecord:
    """Raises CorruptSnapshot."""
    record = decode(data, GenerationFile, where)
    _check_seal(record, where)
    if record.number != number:
        raise CorruptSnapshot(f"{where} says that it is generation {record.number}")
    try:
        if record.resumed_entry is not None:
            parse_entry_name(record.resumed_entry)
        return GenerationRecord.from_json(msgspec.structs.asdict(record))
    except ValueError as error:
        raise CorruptSnapshot(f"{where}: {error}") from error


def generation_file(record: GenerationRecord) -> bytes:
    return encode(sealed(msgspec.convert(record.to_json(), GenerationFile)))


def parse_manifest(data: bytes, entry: CatalogEntry, where: str) -> Manifest:
    """Decoded and checked against its entry. Raises CorruptSnapshot."""
    manifest = decode(data, Manifest, where)
    _check_version(manifest.format, manifest.version, where)
    if (manifest.step, manifest.generation) != (entry.step, entry.generation):
        raise CorruptSnapshot(f"{where} is of step {manifest.step}, generation {manifest.generation}")
    check_manifest(manifest, where)
    return manifest


def _check_version(format_: str, version: int, where: str) -> None:
    if format_ != limits.FORMAT_NAME or version < 1:
        raise CorruptSnapshot(f"{where} has format {format_[:40]!r} {version}", valid=limits.FORMAT_NAME)
    if version > limits.FORMAT_VERSION:
        raise UsageError(
            f"{where} has format version {version}",
            valid=f"at most {limits.FORMAT_VERSION}",
            do="install a newer autoglm-elastic",
        )


def check_manifest(manifest: Manifest, where: str) -> None:
    """Caps, ranges and the form of digests. That the chunks of a tensor cover what is wanted of it exactly
    once is checked where packs are opened. Raises CorruptSnapshot."""
    if len(manifest.tensors) > limits.TENSORS_MAX or len(manifest.packs) > limits.PACKS_MAX:
        raise CorruptSnapshot(f"{where} has {len(manifest.tensors)} tensors in {len(manifest.packs)} packs")
    for pack in manifest.packs:
        good = (
            _SHA256.fullmatch(pack.sha256)
            and 8 < pack.head <= pack.nbytes <= limits.SIZE_MAX
            and pack.head <= limits.HEADER_BYTES_MAX + 8
            and 0 <= pack.rank <= limits.SIZE_MAX
        )
        if not good:
            raise CorruptSnapshot(f"{where}: pack {pack.sha256[:64]!r} of {pack.nbytes} bytes")
    if len({pack.sha256 for pack in manifest.packs}) != len(manifest.packs):
        raise CorruptSnapshot(f"{where}: a pack is listed twice")
    for name, tensor in manifest.tensors.items():
        problem = _tensor_problem(name, tensor)
        if problem:
            raise CorruptSnapshot(f"{where}: tensor {name[:80]!r}: {problem}")
    if sum(chunk_nbytes(tensor.dtype, tensor.shape) for tensor in manifest.tensors.values()) > sum(
        pack.nbytes - pack.head for pack in manifest.packs
    ):
        raise CorruptSnapshot(f"{where}: its tensors are larger than its packs")


def _tensor_problem(name: str, tensor: Tensor) -> str:
    if not name or len(name.encode()) > limits.NAME_BYTES_MAX or "\0" in name:
        return "its name is empty or too long"
    if tensor.dtype not in BY_NAME:
        return f"unknown dtype {tensor.dtype[:40]!r}"
    shape = tensor.shape
    if len(shape) > limits.DIMS_MAX or (shape and not 0 <= min(shape) <= max(shape) <= limits.SIZE_MAX):
        return f"shape {tensor.shape[:8]}"
    if chunk_nbytes(tensor.dtype, tensor.shape) > limits.SIZE_MAX:
        return "it is larger than any file"
    return ""


def elements(shape: Sequence[int]) -> int:
    return math.prod(shape)


def cover(boxes: Iterable[tuple[str, int]]) -> int:
    """A sum over (tensor name, number of elements), so that the ranks' sums can be added and compared with
    that of the whole tensors: a tensor of which somebody writes too much or too little shows, and nobody has
    to gather everybody's boxes. Modulo 2**64."""
    return sum(_weight(name) * elements for name, elements in boxes) % (1 << 64)


@functools.lru_cache(maxsize=1 << 17)
def _weight(name: str) -> int:
    """Odd, so that a difference between two sums can be divided by it."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") | 1


def uncovered(name: str, missing: int) -> int:
    """How many elements of tensor `name` make that difference of two covers; modulo 2**64."""
    return missing * pow(_weight(name), -1, 1 << 64) % (1 << 64)


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes)."""


def cover_problem(shape: Sequence[int], boxes: Sequence[Box]) -> str:
    """ "" when the boxes cover `shape` exactly once, else what is wrong. Equal volumes and no overlap mean
    covered.

    Overlaps are looked for in a sweep along the dimension in which the boxes differ most; for the grids that
    sharding makes this compares each box with its neighbours only."""
    volume = math.prod(shape)
    if len(boxes) == 1 and boxes[0][1] == shape:
        return ""
    filled = [box for box in boxes if math.prod(box[1])]
    total = sum(math.prod(sizes) for _, sizes in filled)
    if total != volume:
        return f"its chunks hold {total} of {volume} elements"
    if len(filled) < 2:
        return ""
    spread = [len({offsets[dim] for offsets, _ in filled}) for dim in range(len(shape))]
    sweep = spread.index(max(spread))
    active: list[Box] = []
    for box in sorted(filled, key=lambda box: box[0][sweep]):
        start = box[0][sweep]
        active = [other for other in active if other[0][sweep] + other[1][sweep] > start]
        if any(overlap(box, other) for other in active):
            return "its chunks overlap"
        active.append(box)
    return ""


def overlap(one: Box, other: Box) -> Box | None:
    """The intersection of two boxes, or None when it is empty."""
    offsets = tuple(map(max, one[0], other[0]))
    ends = tuple(
        min(start + size, start2 + size2)
        for start, size, start2, size2 in zip(one[0], one[1], other[0], other[1], strict=True)
    )
    sizes = tuple(end - start for start, end in zip(offsets, ends, strict=True))
    return (offsets, sizes) if all(size > 0 for size in sizes) else None
