"""Where a tensor's local memory lies in the whole tensor: plain tensors and DTensors on any mesh.

Only geometry: no copy, no I/O, no collective.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.dtypes import BY_NAME, DType
from autoglm_elastic.catalog.format import Box
from autoglm_elastic.errors import UsageError
from autoglm_elastic.snapshot.dtypes import BY_TORCH


@dataclass(frozen=True, slots=True)
class Placed:
    """`local`: this rank's memory, whose shape is `box[1]`. The same box is held by `replicas` ranks, of
    which this is number `replica`; None for a tensor that every rank of the world holds."""

    dtype: DType
    shape: tuple[int, ...]
    box: Box
    local: torch.Tensor
    replicas: int | None
    replica: int


def placed(tensor: torch.Tensor, name: str) -> Placed:
    """Raises UsageError for a tensor that has no plain bytes (sparse, quantized, meta, partial sums,
    wrappers)."""
    shape = tuple(tensor.shape)
    if len(shape) > limits.DIMS_MAX:
        raise UsageError(f"tensor {name} has {len(shape)} dimensions", valid=f"at most {limits.DIMS_MAX}")
    if isinstance(tensor, DTensor):
        local = tensor.to_local().detach()
        offsets, sizes, replicas, replica = _local_box(tensor, name)
        if tuple(local.shape) != sizes:
            raise UsageError(
                f"tensor {name}: its local part is {tuple(local.shape)}, its placements say {sizes}",
                do="shard it with torch's own placements",
            )
        return Placed(_dtype(local, name), shape, (offsets, sizes), local, replicas, replica)
    return Placed(_dtype(tensor, name), shape, ((0,) * len(shape), shape), tensor.detach(), None, 0)


def _dtype(tensor: torch.Tensor, name: str) -> DType:
    dtype = BY_TORCH.get(tensor.dtype)
    if (
        dtype is None
        or tensor.layout is not torch.strided
        or tensor.is_meta
        or is_traceable_wrapper_subclass(tensor)
    ):
        raise UsageError(
            f"tensor {name} is a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}",
            valid=f"a dense tensor or DTensor of {', '.join(BY_NAME)}",
        )
    return dtype


def _local_box(tensor: DTensor, name: str) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """(offsets, sizes, replicas, replica)."""
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UsageError(
            f"tensor {name} lies on a mesh that this rank is not part of", do="leave it out on this rank"
        )
    replicas, replica = 1, 0
    plain = True
    offsets, sizes = [0] * len(shape), list(shape)
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            replica = replica * mesh.size(dim) + coordinate[dim]
            replicas *= mesh.size(dim)
        elif type(placement) is Shard:
            # The rule of torch.chunk: full parts of ceil(n / parts), then a short one, then empty ones.
            extent, axis = sizes[placement.dim], placement.dim
            part = -(-extent // mesh.size(dim))
            start = min(part * coordinate[dim], extent)
            offsets[axis] += start
            sizes[axis] = min(part, extent - start)
        elif placement.is_partial():
            raise UsageError(
                f"tensor {name} is a partial sum ({placement})", do="redistribute it before saving"
            )
        else:
            plain = False
    if plain:
        return tuple(offsets), tuple(sizes), replicas, replica
    local, start_ = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    return tuple(start_), tuple(local), replicas, replica


def part(tensor: torch.Tensor, outer: Box, inner: Box) -> torch.Tensor:
    """The view of `tensor`, which holds `outer`, that is `inner` (a box within it)."""
    for dim, (base, start, size) in enumerate(zip(outer[0], inner[0], inner[1], strict=True)):
        if start != base or size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, start - base, size)
    return tensor


def split(box: Box, element_nbytes: int, nbytes_max: int) -> Iterator[Box]:
    """`box` in row-major parts of at most `nbytes_max` bytes; an empty box gives nothing but itself once."""
    offsets, sizes = box
    total = math.prod(sizes) * element_nbytes
    dim = next((dim for dim, size in enumerate(sizes) if size > 1), None)
    if total <= nbytes_max or dim is None:
        yield box
        return
    rows = max(1, nbytes_max // (total // sizes[dim]))
    for start in range(0, sizes[dim], rows):
        size = min(rows, sizes[dim] - start)
        inner = (
            (*offsets[:dim], offsets[dim] + start, *offsets[dim + 1 :]),
            (*sizes[:dim], size, *sizes[dim + 1 :]),
        )
        yield from split(inner, element_nbytes, nbytes_max)
