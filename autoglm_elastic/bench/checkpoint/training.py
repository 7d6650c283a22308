"""The training that snapshots are taken of: a multilayer perceptron and AdamW, on every rank, forward, backward
and optimizer in earnest; replicated (DDP) or sharded (FSDP2)."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from autoglm_elastic.bench.checkpoint.measure import now
from autoglm_elastic.errors import PlatformError

LAYERS: Final = 8
COPIES: Final = 3
"""Of each parameter in the state: itself and AdamW's two moments."""
BATCH: Final = 32
SEED: Final = 20

State = dict[str, Any]


def width_of(mib: int) -> int:
    """So that the state has about `mib` MiB; even."""
    return int((mib * 2**20 / 4 / COPIES / LAYERS) ** 0.5) // 2 * 2


class Training:
    """`state` shows the live tensors, as `get_state_dict` names them."""

    def __init__(self, mib: int, *, sharded: bool) -> None:
        torch.manual_seed(SEED)
        width = width_of(mib)
        layers: list[nn.Module] = []
        for _ in range(LAYERS):
            layers += [nn.Linear(width, width, bias=False), nn.ReLU()]
        model = nn.Sequential(*layers)
        self._model: nn.Module
        if sharded:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            self._model = model
        else:
            self._model = DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self._batch = torch.randn(BATCH, width)
        self.step()
        model_state, optimizer_state = get_state_dict(self._model, self.optimizer)
        self.state: State = {"model": model_state, "optim": optimizer_state}
        self._refuse_a_copy()

    def _refuse_a_copy(self) -> None:
        """Raises PlatformError unless `state` follows the training: else every contender saves the same again."""
        before = {name: local(tensor).clone() for name, tensor in tensors_of(self.state).items()}
        self.step()
        still = [n for n, tensor in tensors_of(self.state).items() if torch.equal(local(tensor), before[n])]
        if still:
            raise PlatformError(f"get_state_dict gave a copy of {still[0]}")

    def forward_backward(self) -> None:
        self.optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()

    def optimize(self) -> float:
        """One optimizer step. The seconds that hooks of others took before it began."""
        stamps: list[float] = []
        # Registered last, it runs after every hook that a snapshot engine has put there.
        ours = self.optimizer.register_step_pre_hook(lambda *_: stamps.append(now()))
        begin = now()
        try:
            self.optimizer.step()
        finally:
            ours.remove()
        return stamps[0] - begin

    def step(self) -> None:
        self.forward_backward()
        self.optimize()


def tensors_of(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state by path."""
    found: dict[str, torch.Tensor] = {}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
        else:
            found.update(tensors_of(value, f"{prefix}{key}."))
    return found


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    held: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return held.detach()


def nbytes_of(state: State) -> int:
    """Of the whole state, whatever this rank holds of it."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(state).values())
