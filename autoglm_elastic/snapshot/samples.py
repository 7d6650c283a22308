"""A few elements of tensors, taken before and after a copy: they show a change that torch does not count. Fused and
foreach operations on DTensors are not counted, and nothing that goes through `.data` is.

A guard against mistakes: what changes other elements only, or is changed back at once, is not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

TENSORS_MAX: Final = 1024
"""Of so many tensors, evenly among all: a few milliseconds."""
ELEMENTS: Final = 8
"""Of each, evenly over its memory."""


class Samples:
    """Of tensors in the memory of the host. They are kept until `changed` was asked."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        step = max(1, -(-len(tensors) // TENSORS_MAX))
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors[::step]:
            count = tensor.numel()
            if count and tensor.is_contiguous():
                taken = min(count, ELEMENTS)
                few = tensor.as_strided((taken,), (count // taken,))
                by_dtype.setdefault(tensor.dtype, []).append(few)
        self._views = list(by_dtype.values())
        self._before = self._take()

    def changed(self) -> bool:
        """Some of the elements are others now. Asked once."""
        after, before = self._take(), self._before
        self._views, self._before = [], []
        return not all(map(torch.equal, before, after))

    def _take(self) -> list[torch.Tensor]:
        return [torch.cat(views).view(torch.uint8) for views in self._views]
