"""How far the values of two snapshots lie apart: the tensors that their digests do not show to be equal are read."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
import torch

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.diff import Difference, TensorChange
from autoglm_elastic.catalog.dtypes import BY_NAME
from autoglm_elastic.catalog.format import Box, Manifest
from autoglm_elastic.convert._select import OnBytes
from autoglm_elastic.ports import StreamBlobs
from autoglm_elastic.snapshot.boxes import split
from autoglm_elastic.snapshot.dtypes import torch_dtype
from autoglm_elastic.snapshot.read import read_tensors
from autoglm_elastic.snapshot.scatter import Target


def compare_values(
    blobs: StreamBlobs,
    told: Difference,
    before: Manifest,
    after: Manifest,
    on_bytes: OnBytes = lambda nbytes: None,
) -> Difference:
    """The difference with `max_abs` and `elements_changed` where both hold the tensor in one shape and type; tensors
    that turn out equal are counted as the same. Memory: a few chunks. Raises CorruptSnapshot."""
    changes = []
    for change in told.tensors:
        if change.what in ("bytes", "unknown"):
            found = _compare(blobs, change, before, after, on_bytes)
            if found is not None:
                changes.append(found)
        else:
            changes.append(change)
    same = told.same + len(told.tensors) - len(changes)
    return msgspec.structs.replace(told, tensors=tuple(changes), same=same)


def _compare(
    blobs: StreamBlobs, change: TensorChange, before: Manifest, after: Manifest, on_bytes: OnBytes
) -> TensorChange | None:
    tensor = before.tensors[change.name]
    nbytes = changed = 0
    largest: float | None = 0.0
    for box in _boxes(tensor.dtype, tensor.shape):
        one, other = (_read(blobs, manifest, change.name, tensor.dtype, box) for manifest in (before, after))
        raw = one.view(torch.uint8) != other.view(torch.uint8)
        element = BY_NAME[tensor.dtype].nbytes
        differ = raw.view(-1, element).any(dim=1)
        changed += int(differ.sum())
        nbytes += int(differ.sum()) * element
        largest = _larger(largest, one[differ], other[differ])
        on_bytes(one.nbytes + other.nbytes)
    if not changed:
        return None
    return msgspec.structs.replace(
        change, what="bytes", bytes_changed=nbytes, elements_changed=changed, max_abs=largest
    )


def _boxes(dtype: str, shape: tuple[int, ...]) -> Iterator[Box]:
    return split(((0,) * len(shape), shape), BY_NAME[dtype].nbytes, limits.CHUNK_BYTES)


def _read(blobs: StreamBlobs, manifest: Manifest, name: str, dtype: str, box: Box) -> torch.Tensor:
    local = torch.empty(box[1], dtype=torch_dtype(dtype))
    if local.numel():
        read_tensors(blobs, manifest, [Target(name, box, local)])
    return local.reshape(-1)


def _larger(largest: float | None, one: torch.Tensor, other: torch.Tensor) -> float | None:
    """None once a difference is no finite number."""
    if largest is None or not one.numel():
        return largest
    wide = torch.complex128 if one.is_complex() else torch.float64
    found = float((one.to(wide) - other.to(wide)).abs().max())
    return max(largest, found) if math.isfinite(found) else None
