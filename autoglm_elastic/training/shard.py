"""Sharding a module over the world with FSDP2, and making its gradient the mean over the global batch.

FSDP averages over ranks, each counting the same. A rank's share of the batch enters by scaling the gradient
where it
enters the module: at its outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._pytree import tree_map_only


def shard_module(
    module: nn.Module,
    device: torch.device,
    world_size: int,
    scale: Callable[[], float],
    options: dict[str, Any],
) -> None:
    """`fully_shard` over a mesh of the world. `scale()`: this rank's share of the batch times the world
    size.

    Two meshes of as many ranks are equal to torch, whatever this process is in them: what its caches of
    sharding decisions return has the mesh, and with it the rank, of an earlier generation. So they are cleared.
    """
    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    settings = {"mesh": init_device_mesh(device.type, (world_size,))} | options
    for child in module.children():
        has_parameters = next(child.parameters(), None) is not None
        callable_child = not isinstance(child, (nn.ModuleList, nn.ModuleDict))
        for inner in [child] if callable_child else child.children():
            if (
                has_parameters
                and next(inner.parameters(), None) is not None
                and not isinstance(inner, FSDPModule)
            ):
                fully_shard(inner, **settings)
    if not isinstance(module, FSDPModule):
        fully_shard(module, **settings)
    module.register_forward_hook(
        lambda _module, _inputs, output: tree_map_only(Tensor, _scaled(scale), output)
    )


def _scaled(scale: Callable[[], float]) -> Callable[[Tensor], Tensor]:
    def attach(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            tensor.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: gradient * scale() if scale() != 1.0 else gradient
            )
        return tensor

    return attach
