"""Export as Hugging Face's libraries write a model: `model.safetensors`, or shards and `model.safetensors.index.json`.

The files are laid out first and mapped into memory; what is stored is read, verified and copied straight to its place,
in parallel, a bounded piece at a time. A tensor that has several names is written once, under the first, as
`safetensors.torch.save_model` does it; the others are in the metadata."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.dtypes import BY_NAME
from autoglm_elastic.catalog.format import Box, Manifest
from autoglm_elastic.convert._folder import fresh
from autoglm_elastic.convert._select import OnBytes, subtree, tensors_below
from autoglm_elastic.errors import UsageError
from autoglm_elastic.ports import StreamBlobs
from autoglm_elastic.snapshot.boxes import part, split
from autoglm_elastic.snapshot.dtypes import BY_TORCH, torch_dtype
from autoglm_elastic.snapshot.read import read_tensors
from autoglm_elastic.snapshot.scatter import Target

SHARD_BYTES: Final = 5 << 30
"""Where transformers splits, too."""
_BATCH_BYTES: Final = limits.READ_THREADS_MAX * limits.CHUNK_BYTES
"""Read at once: a chunk a thread."""
_INDEX_NAME: Final = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class _Out:
    """One tensor of the export. `dtype`: torch's name of what is written; `begin`: in the data of its shard."""

    name: str
    stored: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BY_NAME[self.dtype].nbytes


@dataclass(frozen=True, slots=True)
class ExportedHf:
    """`tied`: names that were not written, by the name that stands for them."""

    files: tuple[str, ...]
    tensors: int
    nbytes: int
    tied: dict[str, str]


def export_hf(
    blobs: StreamBlobs,
    manifest: Manifest,
    target: Path,
    *,
    prefix: str = "",
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: OnBytes = lambda nbytes: None,
) -> ExportedHf:
    """Writes the new folder `target`.

    Args:
        prefix: only what is below this path of the state, under names without it.
        dtype: floating-point tensors are cast to it (a name of torch's); None: as stored.
        shard_bytes: a file holds at most so many bytes, but at least one tensor.
        on_bytes: told what was just written, in bytes of the export.

    Raises UsageError, CorruptSnapshot, PlatformError; nothing is left behind then.
    """
    outs, tied = _plan(manifest, prefix, dtype)
    shards = _shards(outs, shard_bytes)
    width = max(5, len(str(len(shards))))
    names = [
        "model.safetensors"
        if len(shards) == 1
        else f"model-{number:0{width}d}-of-{len(shards):0{width}d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    with fresh(target) as folder, torch.no_grad():
        for file, shard in zip(names, shards, strict=True):
            aliases = {alias: name for alias, name in tied.items() if name in {out.name for out in shard}}
            _write(blobs, manifest, folder / file, shard, aliases, on_bytes)
        total = sum(out.nbytes for out in outs)
        if len(shards) > 1:
            placed = {out.name: file for file, shard in zip(names, shards, strict=True) for out in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
            (folder / _INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
            names.append(_INDEX_NAME)
    return ExportedHf(tuple(names), len(outs), total, tied)


def _plan(manifest: Manifest, prefix: str, dtype: str | None) -> tuple[list[_Out], dict[str, str]]:
    if dtype is not None and (dtype not in BY_NAME or not torch_dtype(dtype).is_floating_point):
        raise UsageError(f"dtype {dtype[:40]!r}", valid="a floating-point type of torch, as bfloat16")
    names: dict[str, list[str]] = {}
    for name, stored in tensors_below(subtree(manifest, prefix)).items():
        names.setdefault(stored, []).append(name)
    tied: dict[str, str] = {}
    outs = []
    for stored, some in names.items():
        own = stored.removeprefix(f"{prefix}.") if prefix else stored  # the first name that it had
        name = own if own in some else some[0]
        tied |= {other: name for other in some if other != name}
        tensor = manifest.tensors[stored]
        as_stored = torch_dtype(tensor.dtype)
        written = dtype if dtype is not None and as_stored.is_floating_point else tensor.dtype
        kind = BY_NAME[written]
        if kind.parts > 1 or (kind.stored == "U8" and written != "uint8"):
            raise UsageError(
                f"tensor {name} is {tensor.dtype}, which these files have no name for",
                do="leave it out with --prefix, or cast it with --dtype",
            )
        outs.append(_Out(name, stored, written, tensor.shape))
    if not outs:
        raise UsageError(f"no tensor below {prefix!r}", do="autoglm ckpt show lists them")
    return outs, tied


def _shards(outs: list[_Out], shard_bytes: int) -> list[list[_Out]]:
    """In the order of the model; within a file by element size, so that each tensor is aligned to it."""
    shards: list[list[_Out]] = [[]]
    held = 0
    for out in outs:
        if shards[-1] and held + out.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(out)
        held += out.nbytes
    return [_laid_out(shard) for shard in shards]


def _laid_out(shard: list[_Out]) -> list[_Out]:
    laid, at = [], 0
    for out in sorted(shard, key=lambda one: -BY_NAME[one.dtype].nbytes):
        laid.append(_Out(out.name, out.stored, out.dtype, out.shape, at))
        at += out.nbytes
    return laid


def _write(
    blobs: StreamBlobs,
    manifest: Manifest,
    path: Path,
    shard: list[_Out],
    aliases: Mapping[str, str],
    on_bytes: OnBytes,
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **aliases}}
    for out in shard:
        where = [out.begin, out.begin + out.nbytes]
        header[out.name] = {
            "dtype": BY_NAME[out.dtype].stored,
            "shape": list(out.shape),
            "data_offsets": where,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    head = struct.pack("<Q", len(text)) + text
    total = len(head) + sum(out.nbytes for out in shard)
    with path.open("w+b") as file:
        file.write(head)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, total)  # or a full disk would be a signal instead of an error
        with mmap.mmap(file.fileno(), total) as memory:
            whole = torch.frombuffer(memory, dtype=torch.uint8)
            for batch in _batches(shard):
                _fill(blobs, manifest, whole[len(head) :], batch)
                on_bytes(sum(math.prod(box[1]) * BY_NAME[out.dtype].nbytes for out, box in batch))
            del whole
            memory.flush()


def _batches(shard: list[_Out]) -> Iterator[list[tuple[_Out, Box]]]:
    batch: list[tuple[_Out, Box]] = []
    nbytes = 0
    for out in shard:
        element = max(BY_NAME[out.dtype].nbytes, 1)
        for box in split(((0,) * len(out.shape), out.shape), element, limits.CHUNK_BYTES):
            batch.append((out, box))
            nbytes += math.prod(box[1]) * element
            if nbytes >= _BATCH_BYTES:
                yield batch
                batch, nbytes = [], 0
    if batch:
        yield batch


def _fill(blobs: StreamBlobs, manifest: Manifest, data: torch.Tensor, batch: list[tuple[_Out, Box]]) -> None:
    targets, casts = [], []
    for out, box in batch:
        if not out.nbytes:
            continue
        raw = data[out.begin : out.begin + out.nbytes]
        place = part(
            raw.view(torch_dtype(out.dtype)).view(out.shape), ((0,) * len(out.shape), out.shape), box
        )
        stored = torch_dtype(manifest.tensors[out.stored].dtype)
        local = place
        if BY_TORCH[stored].name != out.dtype:
            local = torch.empty(box[1], dtype=stored)
            casts.append((place, local))
        targets.append(Target(out.stored, box, local))
    read_tensors(blobs, manifest, targets)
    for place, local in casts:
        place.copy_(local)
