"""Moving live shards from an old world to a new one, rank to rank, when no shard is missing.

Every rank computes the same schedule: what an old shard and a new one have in common travels once, from the
rank that holds the old one. Nobody gathers a whole tensor. Cuts as `torch.chunk` and DTensor's
`Shard` do, so shards may be uneven or empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from autoglm_elastic.training import move
from autoglm_elastic.training.outcomes import StateMismatch


def piece(total: int, parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of part `index` when `total` is cut as `torch.chunk` does."""
    size = -(-total // parts)
    return min(index * size, total), min((index + 1) * size, total)


def reshard(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor] | None,
    holders: Sequence[int],
    rank: int,
    world_size: int,
) -> None:
    """Fill `targets` from the old world's tensors. All ranks call it with targets in the same order.

    Args:
        targets: of the new world; DTensors sharded over all of it, or plain tensors, equal on all ranks.
        sources: this rank's tensors of the old world in the same order, None for a newcomer.
        holders: the new rank of whoever holds old shard 0, 1, …; holder 0 is the source of plain tensors.

    Raises StateMismatch for a placement other than one `Shard` on a mesh of one dimension.
    """
    plain = []
    for index, target in enumerate(targets):
        source = None if sources is None else sources[index]
        if isinstance(target, DTensor):
            _exchange(target, source, holders, rank, world_size)
            continue
        if source is not None:
            target.copy_(source)
        plain.append(target)
    if plain:
        move.broadcast(plain, holders[0])


def _exchange(
    target: DTensor, source: Tensor | None, holders: Sequence[int], rank: int, world_size: int
) -> None:
    dim = _sharded_dim(target)
    if source is not None and (not isinstance(source, DTensor) or _sharded_dim(source) != dim):
        raise StateMismatch("a tensor was sharded in another dimension before", do="resume from a snapshot")
    total = target.shape[dim]
    here = target.to_local()
    new = [piece(total, world_size, other) for other in range(world_size)]
    old = [piece(total, len(holders), shard) for shard in range(len(holders))]
    arriving, works, kept = [], [], []
    for shard, holder in enumerate(holders):
        for receiver in range(world_size):
            start, stop = max(old[shard][0], new[receiver][0]), min(old[shard][1], new[receiver][1])
            if start >= stop or rank not in (holder, receiver):
                continue
            place = here.narrow(dim, start - new[rank][0], stop - start) if receiver == rank else None
            part = None
            if holder == rank and isinstance(source, DTensor):
                part = source.to_local().narrow(dim, start - old[shard][0], stop - start)
            if place is not None and part is not None:
                place.copy_(part)
            elif part is not None:
                kept.append(part.contiguous())
                works.append(dist.isend(kept[-1], receiver))
            elif place is not None:
                buffer = torch.empty(place.shape, dtype=place.dtype, device=place.device)
                arriving.append((place, buffer))
                works.append(dist.irecv(buffer, holder))
    for work in works:
        if work is not None:
            work.wait()
    for place, buffer in arriving:
        place.copy_(buffer)


def _sharded_dim(tensor: DTensor) -> int:
    placement = tensor.placements[0] if len(tensor.placements) == 1 else None
    if type(placement) is not Shard:
        raise StateMismatch(
            f"a tensor placed {tensor.placements} cannot be moved between live ranks",
            valid="one Shard on a mesh of one dimension",
            do="use a run directory: it is resharded from the snapshot then",
        )
    return placement.dim
