"""The coordinator's arithmetic: from what each rank has prepared to the manifest of the whole. Pure."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from autoglm_elastic.errors import UsageError
from autoglm_elastic.snapshot import format as fmt
from autoglm_elastic.snapshot import limits, tree


def merge(
    prepared: Sequence[fmt.Prepared],
    *,
    step: int,
    generation: int,
    world_size: int,
    config_digest: str | None,
) -> fmt.Manifest:
    """Packs numbered through, a box that several ranks wrote kept once, structures united.

    Raises UsageError when the ranks' parts do not make one whole state.
    """
    packs: dict[str, tuple[int, fmt.Pack]] = {}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    chunks: dict[str, dict[fmt.Box, fmt.Chunk]] = {}
    united: Any = None
    for rank, one in enumerate(prepared):
        numbers = [packs.setdefault(pack.sha256, (len(packs), pack))[0] for pack in one.packs]
        for name, tensor in one.tensors.items():
            what = (tensor.dtype, tensor.shape)
            if shapes.setdefault(name, what) != what:
                raise UsageError(
                    f"tensor {name} is {tensor.dtype} {list(tensor.shape)} on rank {rank}",
                    valid=f"{shapes[name][0]} {list(shapes[name][1])} as on a lower rank",
                )
            mine = chunks.setdefault(name, {})
            for chunk in tensor.chunks:
                box = (chunk.offsets, chunk.sizes)
                mine.setdefault(box, msgspec.structs.replace(chunk, pack=numbers[chunk.pack]))
        united = one.tree if rank == 0 else tree.merge(united, one.tree)
    used = sorted({chunk.pack for mine in chunks.values() for chunk in mine.values()})
    renumbered = {number: place for place, number in enumerate(used)}
    by_number = dict(packs.values())
    return fmt.Manifest(
        format=limits.FORMAT_NAME,
        version=limits.FORMAT_VERSION,
        step=step,
        generation=generation,
        world_size=world_size,
        packs=tuple(by_number[number] for number in used),
        tensors={
            name: fmt.Tensor(
                *shapes[name],
                tuple(
                    msgspec.structs.replace(chunk, pack=renumbered[chunk.pack])
                    for chunk in sorted(mine.values(), key=lambda chunk: (chunk.offsets, chunk.sizes))
                ),
            )
            for name, mine in chunks.items()
        },
        tree=united,
        environment={"python": platform.python_version(), "torch": str(torch.__version__)},
        config_digest=config_digest,
    )
