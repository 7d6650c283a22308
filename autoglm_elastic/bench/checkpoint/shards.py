"""A state whose every value is known from its place alone, so that any world can build it, shard it and check
what it loaded without a message."""

from __future__ import annotations

import zlib
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from autoglm_elastic.bench.checkpoint.peers import rows_of
from autoglm_elastic.bench.checkpoint.training import LAYERS, State, local, tensors_of, width_of

_MULTIPLIER: Final = 0x9E3779B1 - (1 << 32)
"""Knuth's, as int32: neighbours differ in all bytes."""


def layers(mib: int, *, sharded: bool) -> State:
    """Named and shaped as the state of `training.Training`."""
    width = width_of(mib)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None
    names = [f"{2 * layer}.weight" for layer in range(LAYERS)]

    def square() -> torch.Tensor:
        if mesh is None:
            return torch.zeros(width, width)
        per = -(-width // dist.get_world_size())
        start = min(per * dist.get_rank(), width)
        mine = torch.zeros(min(per, width - start), width)
        shape = torch.Size((width, width))
        return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=shape, stride=(width, 1))

    moments: dict[str, dict[str, Any]] = {
        name: {"step": torch.zeros(()), "exp_avg": square(), "exp_avg_sq": square()} for name in names
    }
    return {
        "model": {name: square() for name in names},
        "optim": {"state": moments, "param_groups": [{"lr": 1e-4, "params": names}]},
    }


def small(count: int, nbytes: int) -> State:
    """`count` plain float32 tensors."""
    return {"model": {f"layer.{number}.weight": torch.zeros(nbytes // 4) for number in range(count)}}


def fill(state: State, salt: int = 0) -> None:
    for name, tensor in tensors_of(state).items():
        held = local(tensor)
        held.copy_(_expected(name, tensor, salt))


def clear(state: State) -> None:
    for tensor in tensors_of(state).values():
        local(tensor).zero_()


def wrong(state: State, salt: int = 0) -> list[str]:
    """Names of the tensors that are not, bit for bit, what `fill` had put there."""
    return [
        name
        for name, tensor in tensors_of(state).items()
        if not torch.equal(local(tensor), _expected(name, tensor, salt))
    ]


def _expected(name: str, tensor: torch.Tensor, salt: int) -> torch.Tensor:
    start, _ = rows_of(tensor)
    held = local(tensor)
    row = held[0].numel() if held.dim() and held.shape[0] else 1
    seed = (zlib.crc32(name.encode()) + salt) & 0x7FFFFFFF
    numbers = torch.arange(start * row, start * row + held.numel(), dtype=torch.int32)
    # Below 2**23, so that each is a float32 of its own.
    return (numbers.add_(seed).mul_(_MULTIPLIER).bitwise_and_(0x7FFFFF)).to(torch.float32).view(held.shape)
