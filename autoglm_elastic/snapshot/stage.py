"""Staging: the only work that a snapshot does in the training thread. Copies this rank's boxes into a segment
of memory, laid out there as the packs' files will be.

What depends on the layout alone (packs, headers, the places of every part) is computed once, and so are the
views of a segment that is used again: in the steady state a snapshot costs the copy and one look at the
state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from autoglm_elastic.catalog.format import cover, elements
from autoglm_elastic.catalog.packs import ALIGNMENT, PackPlan, plan_packs
from autoglm_elastic.keeper import PackImage, Segment
from autoglm_elastic.snapshot.dtypes import torch_dtype
from autoglm_elastic.snapshot.layout import Part


class Images:
    """Where the parts of one rank lie in a segment: the image of one file after the other.

    Attributes:
        packs: what a writer must know of each image.
        parts: in the order in which `views` are given.
        nbytes: of a segment that holds all.
        cover: see format.cover.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.cover = cover((part.name, elements(part.box[1])) for part in parts)
        self._plans = plan_packs(parts)
        self.parts = [part for plan in self._plans for part in plan.parts]
        self.packs: tuple[PackImage, ...] = ()
        self.nbytes = 0
        for plan in self._plans:
            self.packs += (_image(plan, self.nbytes),)
            self.nbytes += -(-self.packs[-1].nbytes // ALIGNMENT) * ALIGNMENT
        self._views: WeakKeyDictionary[Segment, list[torch.Tensor]] = WeakKeyDictionary()

    def views(self, segment: Segment) -> list[torch.Tensor]:
        """A tensor for each part, in the segment. Kept for the segment's next use."""
        known = self._views.get(segment)
        if known is None:
            known = self._views[segment] = self._make_views(segment)
        return known

    def _make_views(self, segment: Segment) -> list[torch.Tensor]:
        if not self.nbytes:
            return []
        whole = torch.frombuffer(segment.memory, dtype=torch.uint8)
        made = []
        for plan, image in zip(self._plans, self.packs, strict=True):
            for part, (begin, nbytes) in zip(plan.parts, image.spans, strict=True):
                raw = whole[image.start + begin : image.start + begin + nbytes]
                made.append(raw.view(torch_dtype(part.dtype.name)).view(part.box[1]))
        return made

    def write_heads(self, segment: Segment) -> None:
        """The files' headers, with zeros for the digests."""
        for plan, image in zip(self._plans, self.packs, strict=True):
            segment.memory[image.start : image.start + len(plan.head)] = plan.head


def _image(plan: PackPlan[Part], start: int) -> PackImage:
    head = len(plan.head)
    spans = tuple((head + at, part.nbytes) for at, part in zip(plan.starts, plan.parts, strict=True))
    return PackImage(start, head, plan.digests_at, spans, head + plan.nbytes)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
