"""`torch.save` and safetensors' own files, as people use them: whole tensors in one file of rank 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from autoglm_elastic.bench.checkpoint.training import State, local, tensors_of


def whole(state: Any) -> Any:
    """The state with every sharded tensor whole, on rank 0; the others help to gather and keep nothing."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.detach() if dist.get_rank() == 0 else None
    return state


def torch_save(state: State, path: Path) -> None:
    torch.save(state, path)


def safetensors_save(state: State, path: Path) -> None:
    """Tensors only: this format has no place for the rest."""
    save_file({name: local(tensor) for name, tensor in tensors_of(state).items()}, path)


def torch_load(path: Path, state: State) -> None:
    """Mapped, and of each tensor only the rows copied that this rank holds."""
    stored = tensors_of(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    for name, tensor in tensors_of(state).items():
        local(tensor).copy_(_rows(stored[name], tensor))


def safetensors_load(path: Path, state: State) -> None:
    """Only the rows that this rank holds."""
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors_of(state).items():
            start, stop = rows_of(tensor)
            held = file.get_tensor(name) if tensor.dim() == 0 else file.get_slice(name)[start:stop]
            local(tensor).copy_(held)


def rows_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Which rows of the whole tensor this rank holds."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if tensor.dim() else 0
    chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    if not chunks:
        return 0, 0
    return chunks[0].offsets[0], chunks[0].offsets[0] + chunks[0].sizes[0]


def _rows(stored: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return stored if tensor.dim() == 0 else stored[slice(*rows_of(tensor))]
