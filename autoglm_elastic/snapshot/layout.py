"""From a state to the boxes that one rank writes, and the state's structure as JSON.

Every rank computes its own part from what it holds, without a message: a DTensor's shard is split among the
ranks that hold the same shard, a plain tensor among all ranks, by rows when it is large and by name when it
is small. The coordinator checks afterwards that the parts cover every tensor exactly once (format.cover).

A layout is kept for the next snapshot. `Layout.take` compares all that it depends on: the containers' types
and keys, and of every tensor the type, dtype, shape, device, placements, mesh and which others share its
memory. Values that are no tensors are taken anew each time."""

from __future__ import annotations

import collections
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from autoglm_elastic.catalog import limits, tree
from autoglm_elastic.catalog.dtypes import DType
from autoglm_elastic.catalog.format import Box, Structure, Tensor
from autoglm_elastic.catalog.format import encode as encode_document
from autoglm_elastic.catalog.merge import structure_digest
from autoglm_elastic.catalog.prepared import Details, Wish
from autoglm_elastic.core.split import even
from autoglm_elastic.errors import UsageError
from autoglm_elastic.snapshot import walk
from autoglm_elastic.snapshot.boxes import Placed, placed, split
from autoglm_elastic.snapshot.encode import as_tensor, encode_key, encode_value

_LIKE_A_PART: Final = re.compile(r"@[0-9,]*$")
"""A name that ends like this could be taken for a part of another tensor in a pack's header."""

_KEPT: Final = (str, int, bytes, bool, type(None))
"""Types of which equal values have equal JSON, once the type is known to be the same."""

_facts = attrgetter("dtype", "shape", "device", "layout")
_inside = attrgetter("_local_tensor", "_spec")
"""What `DTensor.to_local()`, `.device_mesh` and `.placements` give, without a call each."""


@dataclass(frozen=True, slots=True)
class Part:
    """A box of tensor `name` that this rank writes as one chunk. It is cut out of this rank's memory number
    `source` by `cuts`: (dim, start, size) to narrow by."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    box: Box
    source: int
    cuts: tuple[tuple[int, int, int], ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.box[1]) * self.dtype.nbytes

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """The part as a view of its memory."""
        for dim, start, size in self.cuts:
            local = local.narrow(dim, start, size)
        return local


@dataclass(frozen=True, slots=True)
class Taken:
    """A state as it is now, in a layout. `local`: the memory of each of its tensors on this rank, at
    `pointers`. `values`: JSON of the leaves that are no tensors."""

    layout: Layout
    tensors: list[torch.Tensor]
    local: list[torch.Tensor]
    pointers: list[int]
    values: list[Any]


class Layout:
    """What one rank writes of all states of one shape.

    Attributes:
        parts: what this rank writes.
        shapes: every tensor that it knows of, whether it writes a part of it or not.
        digest: structure_digest of the structure.
    """

    def __init__(self, state: Mapping[str, Any], rank: int, world_size: int) -> None:
        """Raises UsageError for a state that does not fit, naming the place."""
        self._shape, leaves = walk.learn(state)
        kinds = [isinstance(leaf, torch.Tensor) + 2 * isinstance(leaf, np.ndarray) for leaf in leaves]
        self._tensor_at = [at for at, kind in enumerate(kinds) if kind]
        self._value_at = [at for at, kind in enumerate(kinds) if not kind]
        self._arrays = [number for number, at in enumerate(self._tensor_at) if kinds[at] == 2]
        if len(self._tensor_at) > limits.TENSORS_MAX:
            raise UsageError("the state has too many tensors", valid=f"at most {limits.TENSORS_MAX}")
        tensors = self._tensors(leaves)
        self._distributed = [number for number, one in enumerate(tensors) if isinstance(one, DTensor)]
        paths = [self._shape.paths[at] for at in self._tensor_at]
        wheres = [placed(one, tree.path_name(path)) for one, path in zip(tensors, paths, strict=True)]
        local, self._specs = _unwrap(tensors, self._distributed)
        self._seen = list(map(_facts, local))
        pointers = list(map(torch.Tensor.data_ptr, local))
        self._ties = _ties(tensors, pointers)
        self.shapes: dict[str, Tensor] = {}
        names: list[str] = []
        parts: list[Part] = []
        for number, where in enumerate(wheres):
            if self._ties[number] != number:
                names.append(names[self._ties[number]])
                continue
            name = free_name(tree.path_name(paths[number]) or "value", self.shapes)
            names.append(name)
            self.shapes[name] = Tensor(where.dtype.name, where.shape)
            parts.extend(_own_parts(name, where, number, rank, world_size))
        self.parts = tuple(parts)
        self._nodes: list[Any] = [None] * len(leaves)
        for at, name in zip(self._tensor_at, names, strict=True):
            self._nodes[at] = {"$": "array" if kinds[at] == 2 else "tensor", "v": name}
        self._built = self._shape.fixed(self._nodes, frozenset(self._value_at), encode_key)
        self._details: bytes | None = None
        self._known: dict[int, tuple[Any, Any]] = {}
        values = self.values(leaves)
        self.digest = structure_digest(self.structure(values))
        self._first: list[Taken] = [Taken(self, tensors, local, pointers, values)]

    def first(self) -> Taken:
        """The state that the layout was made of, once."""
        return self._first.pop()

    def take(self, state: Mapping[str, Any]) -> Taken | None:
        """The state as it is now, or None when it needs another layout."""
        leaves = self._shape.follow(state)
        if leaves is None:
            return None
        tensors = self._tensors(leaves)
        local, specs = _unwrap(tensors, self._distributed)
        if specs != self._specs or list(map(_facts, local)) != self._seen:
            return None
        pointers = list(map(torch.Tensor.data_ptr, local))
        if _ties(tensors, pointers) != self._ties:
            return None
        return Taken(self, tensors, local, pointers, self.values(leaves))

    def _tensors(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        tensors = [leaves[at] for at in self._tensor_at]
        for number in self._arrays:
            tensors[number] = as_tensor(tensors[number], self._shape.paths[self._tensor_at[number]])
        return tensors

    def values(self, leaves: Sequence[Any]) -> list[Any]:
        """JSON of the leaves that are no tensors. What is as it was the last time is not encoded again."""
        paths, known = self._shape.paths, self._known
        found = []
        for at in self._value_at:
            leaf = leaves[at]
            last = known.get(at)
            if last is None or last[0] != leaf:
                last = (leaf, encode_value(leaf, paths[at]))
                if type(leaf) in _KEPT:
                    known[at] = last
            found.append(last[1])
        return found

    def structure(self, values: Sequence[Any]) -> Structure:
        """With the values of one snapshot."""
        nodes = list(self._nodes)
        for at, value in zip(self._value_at, values, strict=True):
            nodes[at] = value
        return Structure(tensors=self.shapes, tree=self._shape.build(nodes, self._built, encode_key))

    def details(self, values: Sequence[Any], wish: Wish | None) -> bytes:
        """`Details`, encoded. Where there is no wish the values do not count either, and it is the same for
        all snapshots."""
        if wish is not None:
            return encode_document(Details(structure=self.structure(values), wish=wish))
        if self._details is None:
            self._details = encode_document(Details(structure=self.structure(values)))
        return self._details


def parts_of(
    name: str,
    dtype: DType,
    shape: tuple[int, ...],
    box: Box,
    source: int,
    cuts: tuple[tuple[int, int, int], ...] = (),
) -> list[Part]:
    """`box` of a tensor in chunks; nothing for an empty box of a tensor that is not empty itself.

    Args:
        source, cuts: as of Part: where `box` is to be had.
    """
    if 0 in box[1] and 0 not in shape:
        return []
    return [
        Part(name, dtype, shape, inner, source, (*cuts, *_cuts(box, inner)))
        for inner in split(box, dtype.nbytes, limits.CHUNK_BYTES)
    ]


def _cuts(outer: Box, inner: Box) -> tuple[tuple[int, int, int], ...]:
    rows = zip(outer[0], outer[1], inner[0], inner[1], strict=True)
    return tuple(
        (dim, start - base, size)
        for dim, (base, extent, start, size) in enumerate(rows)
        if start != base or size != extent
    )


def _own_parts(name: str, where: Placed, source: int, rank: int, world_size: int) -> list[Part]:
    replicas = world_size if where.replicas is None else where.replicas
    replica = rank if where.replicas is None else where.replica
    offsets, sizes = where.box
    nbytes = math.prod(sizes) * where.dtype.nbytes
    mine = where.box
    if replicas > 1 and nbytes >= limits.SPLIT_BYTES_MIN and sizes and sizes[0] > 1:
        start, stop = even(sizes[0], replicas)[replica]
        if start == stop:
            return []
        mine = ((offsets[0] + start, *offsets[1:]), (stop - start, *sizes[1:]))
    elif replicas > 1 and zlib.crc32(name.encode()) % replicas != replica:
        return []
    return parts_of(name, where.dtype, where.shape, mine, source, _cuts(where.box, mine))


def free_name(name: str, taken: Mapping[str, object]) -> str:
    """`name`, or it with a number. Raises UsageError for one that cannot be stored."""
    if len(name.encode()) > limits.NAME_BYTES_MAX or "\0" in name or name == "__metadata__":
        raise UsageError(f"tensor name {name[:80]!r}", valid=f"at most {limits.NAME_BYTES_MAX} bytes, no NUL")
    free, number = name, 1
    while free in taken or _LIKE_A_PART.search(free):
        number += 1
        free = f"{name}#{number}"
    return free


def _unwrap(
    tensors: Sequence[torch.Tensor], distributed: Sequence[int]
) -> tuple[list[torch.Tensor], list[Any]]:
    """(each tensor's memory on this rank, mesh and placements of the distributed ones)."""
    local, specs = list(tensors), []
    for number in distributed:
        local[number], spec = _inside(tensors[number])
        specs.append(spec)
    return local, specs


def _ties(tensors: Sequence[torch.Tensor], pointers: Sequence[int]) -> list[int]:
    """For each tensor the number of the first that is the same elements of the same memory: itself for most.

    What looks at memory in another way (a view, another dtype) is another tensor; distributed ones are never
    tied; where memory says nothing (empty tensors) neither."""
    ties = list(range(len(pointers)))
    if len(set(pointers)) == len(pointers):
        return ties
    count = collections.Counter(pointers)
    first: dict[tuple[object, ...], int] = {}
    for number, pointer in enumerate(pointers):
        if pointer and count[pointer] > 1:
            tensor = tensors[number]
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                bits = (tensor.is_conj(), tensor.is_neg())
                key = (tensor.device, pointer, tensor.shape, tensor.stride(), tensor.dtype, bits)
                ties[number] = first.setdefault(key, number)
    return ties
