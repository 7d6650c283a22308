"""What others wrote, opened for reading: tensors by name, read a box at a time, and the structure that they make.

Nothing in a file is executed: safetensors are data, torch.save files are opened with `weights_only`, and the pickled
`.metadata` of torch.distributed.checkpoint goes through dcp_metadata.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open

from autoglm_elastic.catalog import limits, tree
from autoglm_elastic.catalog.dtypes import BY_NAME
from autoglm_elastic.catalog.format import Box, Structure, Tensor
from autoglm_elastic.convert.dcp_metadata import METADATA_NAME
from autoglm_elastic.convert.from_dcp import DcpSource
from autoglm_elastic.convert.safe_load import torch_loaded
from autoglm_elastic.errors import CorruptSnapshot, UsageError
from autoglm_elastic.snapshot.boxes import part, split
from autoglm_elastic.snapshot.dtypes import BY_TORCH
from autoglm_elastic.snapshot.encode import encode

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
_INDEX_BYTES_MAX: Final = 256 << 20


class Source(Protocol):
    """`structure` names the tensors as they will be named in the snapshot."""

    structure: Structure

    def boxes(self, name: str) -> Iterator[Box]:
        """What `read` can give of a tensor in one piece; together they are the whole of it."""

    def read(self, name: str, box: Box) -> torch.Tensor:
        """One of the boxes, on the CPU. Raises CorruptSnapshot."""


def open_source(path: Path, prefix: str = "") -> Source:
    """A folder or file of Hugging Face's safetensors, a folder of torch.distributed.checkpoint, or a torch.save file.

    Args:
        prefix: where the tensors of safetensors are put in the state; the other formats bring a structure of their own.

    Raises UsageError for what is none of them, or holds what a snapshot cannot; CorruptSnapshot.
    """
    if (path / METADATA_NAME).is_file():
        _no_prefix(prefix, path)
        return DcpSource(path)
    if (path / INDEX_NAME).is_file():
        return SafetensorsSource(_indexed(path), prefix)
    if (path / SINGLE_NAME).is_file():
        return SafetensorsSource({None: path / SINGLE_NAME}, prefix)
    if path.name == INDEX_NAME and path.is_file():
        return SafetensorsSource(_indexed(path.parent), prefix)
    if path.suffix == ".safetensors" and path.is_file():
        return SafetensorsSource({None: path}, prefix)
    if path.is_file():
        _no_prefix(prefix, path)
        return TorchSource(path)
    what = "holds nothing that can be imported" if path.is_dir() else "does not exist"
    raise UsageError(
        f"{path} {what}",
        valid=f"a folder with {SINGLE_NAME}, {INDEX_NAME} or {METADATA_NAME}; a .safetensors or a torch.save file",
    )


def _no_prefix(prefix: str, path: Path) -> None:
    if prefix:
        raise UsageError(f"--prefix {prefix} for {path}", valid="--prefix for safetensors only")


def _indexed(folder: Path) -> dict[str | None, Path]:
    """Tensor → file, as the index says."""
    path = folder / INDEX_NAME
    try:
        with path.open("rb") as file:
            data = file.read(_INDEX_BYTES_MAX + 1)
        weights = json.loads(data)["weight_map"] if len(data) <= _INDEX_BYTES_MAX else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptSnapshot(f"{path} does not decode: {str(error)[:160]}") from error
    if not isinstance(weights, dict) or not weights:
        raise CorruptSnapshot(f"{path} has no weight_map")
    found: dict[str | None, Path] = {}
    for name, file in weights.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CorruptSnapshot(f"{path}: {str(file)[:80]!r} is no file beside it")
        found[name] = folder / file
    return found


class SafetensorsSource:
    """`files`: tensor → file; the key None stands for every tensor of its file."""

    def __init__(self, files: dict[str | None, Path], prefix: str) -> None:
        self._slices: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        nodes: dict[str, Any] = {}
        try:
            opened: dict[Path, Any] = {
                path: safe_open(path, framework="pt") for path in sorted(set(files.values()))
            }
            for wanted, path in files.items():
                there = list(opened[path].keys())
                if wanted is not None and wanted not in there:
                    raise CorruptSnapshot(f"{path} has no tensor {wanted[:80]!r}")
                for own in there if wanted is None else [wanted]:
                    view = opened[path].get_slice(own)
                    name = f"{prefix}.{own}" if prefix else own
                    shape = tuple(view.get_shape())
                    # A box of no elements tells the type as torch has it.
                    empty = view[(slice(0, 0),)] if shape else opened[path].get_tensor(own)
                    tensors[name] = Tensor(_dtype_name(empty.dtype, own), shape)
                    nodes[own] = {"$": "tensor", "v": name}
                    self._slices[name] = view if shape else empty
        except (SafetensorError, OSError) as error:
            raise CorruptSnapshot(f"{sorted(set(files.values()))[0].parent}: {str(error)[:200]}") from error
        root: Any = nodes
        for key in reversed(prefix.split(".") if prefix else []):
            root = {key: root}
        self.structure = Structure(tensors=tensors, tree=root)

    def boxes(self, name: str) -> Iterator[Box]:
        return whole_boxes(self.structure.tensors[name])

    def read(self, name: str, box: Box) -> torch.Tensor:
        view = self._slices[name]
        if isinstance(view, torch.Tensor):
            return view
        ranges = tuple(slice(start, start + size) for start, size in zip(*box, strict=True))
        try:
            read: torch.Tensor = view[ranges]
        except SafetensorError as error:
            raise CorruptSnapshot(f"tensor {name}: {str(error)[:200]}") from error
        return read


class TorchSource:
    """A file of torch.save, mapped into memory."""

    def __init__(self, path: Path) -> None:
        state = torch_loaded(path, str(path))
        self._tensors: dict[str, torch.Tensor] = {}
        tensors: dict[str, Tensor] = {}
        known: dict[tuple[object, ...], str] = {}

        def name_tensor(where: tree.Path, tensor: torch.Tensor) -> str:
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if tensor.numel() and key in known:
                return known[key]
            name = tree.path_name(where) or "value"
            while name in tensors:
                name += "#"
            known[key] = name
            tensors[name] = Tensor(_dtype_name(tensor.dtype, name), tuple(tensor.shape))
            self._tensors[name] = tensor.detach()
            return name

        if not isinstance(state, dict):
            state = {"value": state}
        self.structure = Structure(tensors=tensors, tree=encode(state, (), name_tensor))

    def boxes(self, name: str) -> Iterator[Box]:
        return whole_boxes(self.structure.tensors[name])

    def read(self, name: str, box: Box) -> torch.Tensor:
        whole = self._tensors[name]
        return part(whole, ((0,) * whole.dim(), tuple(whole.shape)), box)


def whole_boxes(tensor: Tensor) -> Iterator[Box]:
    """The whole tensor in pieces of a chunk's size."""
    return split(((0,) * len(tensor.shape), tensor.shape), BY_NAME[tensor.dtype].nbytes, limits.CHUNK_BYTES)


def _dtype_name(dtype: torch.dtype, name: str) -> str:
    if dtype not in BY_TORCH:
        raise UsageError(
            f"tensor {name} is {dtype}", valid=", ".join(kind.name for kind in BY_TORCH.values())
        )
    return BY_TORCH[dtype].name
