"""Staging: the only work that a snapshot does in the training thread. Copies this rank's boxes to host
memory.

The copy is laid out as the packs' data will be, so that writing is one stream per pack. The memory is kept
and used again by the next snapshot: in the steady state nothing is allocated and no page is touched for the
first time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from autoglm_elastic.catalog.format import Structure
from autoglm_elastic.catalog.merge import structure_digest
from autoglm_elastic.catalog.packs import PackPlan, plan_packs
from autoglm_elastic.snapshot.layout import Layout, Part

_ALIGNMENT: Final = 64


@dataclass(frozen=True, slots=True)
class Staged:
    """One rank's copy. `data[i]` are the bytes of `plans[i]`; valid until its arena is staged into again."""

    plans: tuple[PackPlan[Part], ...]
    data: tuple[memoryview, ...]
    structure: Structure
    digest: str
    """structure_digest of `structure`."""
    cover: int
    nbytes: int


class Arena:
    """Host memory for one snapshot in flight. Not thread safe: its owner stages only when the last one is
    released."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def stage(self, layout: Layout) -> Staged:
        """Copies everything now; the state may change as soon as this returns."""
        plans = plan_packs(layout.parts)
        bases: list[int] = []
        total = 0
        for plan in plans:
            bases.append(total)
            total += -(-plan.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._memory.numel() < total:
            pinned = any(part.source.is_cuda for part in layout.parts)
            self._memory = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
        with torch.no_grad():
            for plan, base in zip(plans, bases, strict=True):
                for part, start in zip(plan.parts, plan.starts, strict=True):
                    if part.nbytes:
                        raw = self._memory[base + start : base + start + part.nbytes]
                        copy_bits(raw, part.source, part.box[1])
        whole = memory_of(self._memory)
        data = tuple(whole[base : base + plan.nbytes] for plan, base in zip(plans, bases, strict=True))
        structure = layout.structure()
        return Staged(
            tuple(plans),
            data,
            structure,
            structure_digest(structure),
            layout.cover(),
            sum(plan.nbytes for plan in plans),
        )


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def copy_bits(raw: torch.Tensor, source: torch.Tensor, sizes: tuple[int, ...]) -> None:
    """`source`, of any strides and device, into the bytes `raw`, row-major."""
    raw.view(source.dtype).view(sizes).copy_(source)
