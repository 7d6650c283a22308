"""From a state to the boxes that one rank writes, and the state's structure as JSON.

Every rank computes its own part from what it holds, without a message: a DTensor's shard is split among the
ranks that hold the same shard, a plain tensor among all ranks, by rows when it is large and by name when it
is small. The coordinator checks afterwards that the parts cover every tensor exactly once
(format.cover_problem)."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from autoglm_elastic.catalog import limits, tree
from autoglm_elastic.catalog.dtypes import DType
from autoglm_elastic.catalog.format import Box, Structure, Tensor, cover, elements
from autoglm_elastic.core.split import even
from autoglm_elastic.errors import UsageError
from autoglm_elastic.snapshot.boxes import Placed, part, placed, split
from autoglm_elastic.snapshot.encode import encode

_LIKE_A_PART: Final = re.compile(r"@[0-9,]*$")
"""A name that ends like this could be taken for a part of another tensor in a pack's header."""


@dataclass(frozen=True, slots=True)
class Part:
    """A box of tensor `name` that this rank writes as one chunk; `source` is the live memory of exactly that
    box."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    box: Box
    source: torch.Tensor

    @property
    def nbytes(self) -> int:
        return math.prod(self.box[1]) * self.dtype.nbytes


@dataclass(slots=True)
class Layout:
    """`shapes` names every tensor that this rank knows of, whether it writes a part of it or not."""

    parts: list[Part] = field(default_factory=list)
    shapes: dict[str, Tensor] = field(default_factory=dict)
    tree: Any = None

    def structure(self) -> Structure:
        return Structure(tensors=self.shapes, tree=self.tree)

    def cover(self) -> int:
        return cover((part.name, elements(part.box[1])) for part in self.parts)


def lay_out(state: Mapping[str, Any], rank: int, world_size: int) -> Layout:
    """Raises UsageError for a state that does not fit, naming the place."""
    layout = Layout()
    aliases: dict[tuple[object, ...], str] = {}

    def name_tensor(path: tree.Path, tensor: torch.Tensor) -> str:
        key = _identity(tensor)
        if key is not None and key in aliases:
            return aliases[key]
        name = _free_name(tree.path_name(path) or "value", layout.shapes)
        where = placed(tensor, name)
        layout.shapes[name] = Tensor(where.dtype.name, where.shape)
        if len(layout.shapes) > limits.TENSORS_MAX:
            raise UsageError("the state has too many tensors", valid=f"at most {limits.TENSORS_MAX}")
        if key is not None:
            aliases[key] = name
        layout.parts.extend(_own_parts(name, where, rank, world_size))
        return name

    layout.tree = encode(state, (), name_tensor)
    return layout


def parts_of(name: str, dtype: DType, shape: tuple[int, ...], box: Box, local: torch.Tensor) -> list[Part]:
    """`box` of a tensor, held in `local`, in chunks; nothing for an empty box of a tensor that is not empty
    itself."""
    if 0 in box[1] and 0 not in shape:
        return []
    return [
        Part(name, dtype, shape, inner, part(local, box, inner))
        for inner in split(box, dtype.nbytes, limits.CHUNK_BYTES)
    ]


def _own_parts(name: str, where: Placed, rank: int, world_size: int) -> list[Part]:
    replicas = world_size if where.replicas is None else where.replicas
    replica = rank if where.replicas is None else where.replica
    offsets, sizes = where.box
    nbytes = math.prod(sizes) * where.dtype.nbytes
    if replicas > 1 and nbytes >= limits.SPLIT_BYTES_MIN and sizes and sizes[0] > 1:
        start, stop = even(sizes[0], replicas)[replica]
        if start == stop:
            return []
        mine = ((offsets[0] + start, *offsets[1:]), (stop - start, *sizes[1:]))
        return parts_of(name, where.dtype, where.shape, mine, part(where.local, where.box, mine))
    if replicas > 1 and zlib.crc32(name.encode()) % replicas != replica:
        return []
    return parts_of(name, where.dtype, where.shape, where.box, where.local)


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    if len(name.encode()) > limits.NAME_BYTES_MAX or "\0" in name or name == "__metadata__":
        raise UsageError(f"tensor name {name[:80]!r}", valid=f"at most {limits.NAME_BYTES_MAX} bytes, no NUL")
    free, number = name, 1
    while free in taken or _LIKE_A_PART.search(free):
        number += 1
        free = f"{name}#{number}"
    return free


def _identity(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """Equal for tied tensors: the same elements of the same memory. None where memory says nothing (empty,
    wrappers)."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.numel() or tensor.is_meta:
        return None
    if tensor.layout is not torch.strided:
        return None
    bits = (tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, bits)
