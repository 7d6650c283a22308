"""A stock directory of torch.distributed.checkpoint as a source (see foreign.py). Its chunks are read one at a time."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from autoglm_elastic.catalog import limits, tree
from autoglm_elastic.catalog.dtypes import BY_NAME
from autoglm_elastic.catalog.format import Box, Structure, Tensor, cover_problem
from autoglm_elastic.convert.dcp_metadata import METADATA_NAME, DType, Record, read_metadata
from autoglm_elastic.convert.safe_load import torch_loaded
from autoglm_elastic.errors import CorruptSnapshot, UsageError
from autoglm_elastic.snapshot.dtypes import torch_dtype
from autoglm_elastic.snapshot.encode import encode
from autoglm_elastic.storage import LocalBlobs

_OVERHEAD_BYTES: Final = 1 << 20
"""What torch.save may add to the bytes of a tensor."""


class DcpSource:
    def __init__(self, folder: Path) -> None:
        self._files = LocalBlobs(folder)
        self._boxes: dict[str, tuple[Box, ...]] = {}
        metadata = read_metadata(folder)
        try:
            self.structure = self._read(metadata, folder)
        except (AttributeError, TypeError, ValueError, KeyError, RecursionError) as error:
            raise CorruptSnapshot(
                f"{folder / METADATA_NAME} has another form: {type(error).__name__}"
            ) from error

    def _read(self, metadata: Record, folder: Path) -> Structure:
        self._places = self._read_places(metadata)
        tensors: dict[str, Tensor] = {}
        nodes: dict[tree.Path, Any] = {}
        described = _mapping(metadata.field("state_dict_metadata"))
        paths = metadata.fields.get("planner_data")
        for name, kind in described.items():
            path = _path(paths.get(name) if isinstance(paths, dict) else None, name)
            if _is(kind, "TensorStorageMetadata"):
                tensors[name] = self._tensor(name, kind)
                nodes[path] = {"$": "tensor", "v": name}
            else:
                data = io.BytesIO(self._bytes(name, (), limits.TREE_TEXT_MAX))
                nodes[path] = encode(torch_loaded(data, f"{name} of {folder}"), path, _no_tensor)
        return Structure(tensors=tensors, tree=tree.nest(nodes))

    def boxes(self, name: str) -> Iterator[Box]:
        return iter(self._boxes[name])

    def read(self, name: str, box: Box) -> torch.Tensor:
        tensor = self.structure.tensors[name]
        nbytes = math.prod(box[1]) * BY_NAME[tensor.dtype].nbytes
        data = self._bytes(name, box[0], nbytes + _OVERHEAD_BYTES)
        read = torch_loaded(io.BytesIO(data), f"{name} of {self._files.root}")
        if (
            not isinstance(read, torch.Tensor)
            or tuple(read.shape) != box[1]
            or read.dtype != torch_dtype(tensor.dtype)
        ):
            raise CorruptSnapshot(
                f"{self._files.root}: {name} at {list(box[0])} is not what {METADATA_NAME} says"
            )
        return read

    def _read_places(self, metadata: Record) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
        """(name, offsets) → (file, offset, bytes)."""
        places = {}
        for index, info in _mapping(metadata.field("storage_data")).items():
            if not _is(index, "MetadataIndex") or not _is(info, "_StorageInfo"):
                raise CorruptSnapshot(f"{METADATA_NAME}: its storage_data have another form")
            if info.fields.get("transform_descriptors"):
                raise UsageError(
                    f"{self._files.root} is transformed ({str(info.field('transform_descriptors'))[:60]})",
                    do="save it without stream transforms",
                )
            offset = index.fields.get("offset")
            at = () if offset is None else _numbers(offset)
            where = (info.field("relative_path"), info.field("offset"), info.field("length"))
            if not isinstance(where[0], str) or "/" in where[0] or not all(type(n) is int for n in where[1:]):
                raise CorruptSnapshot(f"{METADATA_NAME}: {str(where)[:80]} is no place in a file beside it")
            places[str(index.field("fqn")), at] = where
        return places

    def _tensor(self, name: str, kind: Record) -> Tensor:
        dtype = kind.field("properties")
        found = _dtype(dtype)
        if found not in BY_NAME:
            raise UsageError(f"{name} is {found}", valid=", ".join(BY_NAME))
        shape = _numbers(kind.field("size"))
        boxes = []
        for chunk in kind.field("chunks"):
            if not _is(chunk, "ChunkStorageMetadata"):
                raise CorruptSnapshot(f"{METADATA_NAME}: chunks of {name[:80]!r} have another form")
            boxes.append((_numbers(chunk.field("offsets")), _numbers(chunk.field("sizes"))))
        problem = (
            ""
            if all(len(box[0]) == len(box[1]) == len(shape) for box in boxes)
            else "their dimensions differ"
        )
        problem = problem or cover_problem(shape, boxes)
        if problem or any((name, box[0]) not in self._places for box in boxes):
            raise CorruptSnapshot(f"{METADATA_NAME}: {name[:80]!r}: {problem or 'a chunk lies nowhere'}")
        for offsets, sizes in boxes:
            nbytes = math.prod(sizes) * BY_NAME[found].nbytes
            if self._places[name, offsets][2] < nbytes:
                raise CorruptSnapshot(
                    f"{METADATA_NAME}: {name[:80]!r} at {list(offsets)} is shorter than {nbytes} bytes"
                )
        self._boxes[name] = tuple(box for box in boxes if 0 not in box[1] or 0 in shape)
        return Tensor(found, shape)

    def _bytes(self, name: str, offsets: tuple[int, ...], nbytes_max: int) -> bytes:
        place = self._places.get((name, offsets))
        if place is None:
            raise CorruptSnapshot(f"{METADATA_NAME}: {name[:80]!r} lies nowhere")
        file, offset, nbytes = place
        if not 0 <= nbytes <= nbytes_max:
            raise CorruptSnapshot(f"{file}: {name[:80]!r} has {nbytes} bytes", valid=f"at most {nbytes_max}")
        try:
            return self._files.read_range(file, offset, nbytes)
        except FileNotFoundError as error:
            raise CorruptSnapshot(f"{self._files.root}/{file} is missing") from error


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Record) and type(value).__name__ == name


def _mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise CorruptSnapshot(f"{METADATA_NAME}: a {type(value).__name__} stands where a dict should")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    """A torch.Size."""
    inside = value.args[0] if _is(value, "Size") and len(value.args) == 1 else value
    good = isinstance(inside, tuple | list) and all(
        type(n) is int and 0 <= n <= limits.SIZE_MAX for n in inside
    )
    if not good:
        raise CorruptSnapshot(f"{METADATA_NAME}: {str(inside)[:80]} is no shape")
    return tuple(inside)


def _dtype(properties: Any) -> str:
    """TensorProperties pickles as a tuple whose first item is the type."""
    inside = (*properties.args, *properties.fields.values()) if isinstance(properties, Record) else ()
    for value in inside:
        if isinstance(value, type) and issubclass(value, DType):
            return value.name
    raise CorruptSnapshot(f"{METADATA_NAME}: a tensor without a type")


def _path(value: Any, name: str) -> tree.Path:
    if value is None:
        return (name,)
    if not isinstance(value, tuple) or not value or not all(isinstance(key, str | int) for key in value):
        raise CorruptSnapshot(f"{METADATA_NAME}: the path of {name[:80]!r} has another form")
    return value


def _no_tensor(path: tree.Path, tensor: torch.Tensor) -> str:
    raise UsageError(
        f"a tensor inside of the value {tree.path_name(path)}", do="save it as a tensor of its own"
    )
