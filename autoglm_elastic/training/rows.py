"""The committed steps of this process whose loss, a mean over the global batch, is not known yet.

A loss is known here when its step commits, the others' only later: every rank adds two numbers to the next
step's control numbers, its share of the batch times its local loss, and the share. When their sums are there,
the row of the step is complete. No collective and no wait for a device: on an accelerator the loss is read one
step later, when it is on the host.

Must never: make a step fail.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from autoglm_elastic.training.outcomes import MisuseError

NUMBERS: Final = 2
"""share x loss, share."""

ROWS_MAX: Final = 16
"""Rows that wait; where nothing is reduced for so long, the oldest are written without a loss."""

Told = list[list[float | None]]
"""(step, share x loss, share) of each row that a rank still has; None for a loss that is not finite."""


@dataclass(slots=True)
class Row:
    """One committed step. `values`: what else this rank gave. `share`: of this rank in the batch, 0 when it
    gave no loss."""

    step: int
    generation: int
    wall_time: float
    world_size: int
    values: Mapping[str, Any] = field(default_factory=dict)
    share: float = 0.0
    loss: float | _OnItsWay = 0.0

    def numbers(self) -> tuple[float, float]:
        return (self.share * float(self.loss), self.share) if self.share else (0.0, 0.0)


class _OnItsWay:
    """A number that is being copied from a device."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.detach().to("cpu", torch.float64, non_blocking=True)
        self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._there.record()

    def __float__(self) -> float:
        self._there.synchronize()
        return float(self._host)


class Rows:
    """One per process.

    Args:
        write: called with each row in the order of steps, and the mean loss or None, on every rank.
    """

    def __init__(self, write: Callable[[Row, float | None], None]) -> None:
        self._write = write
        self._waiting: deque[Row] = deque()
        self._sent: Row | None = None
        self._lag = 0

    def add(self, row: Row, loss: Any) -> None:
        """A step has committed. `loss`: a number, a tensor of one element, or None."""
        if loss is None:
            row.share = 0.0
        elif isinstance(loss, Tensor) and loss.is_cuda:
            row.loss, self._lag = _OnItsWay(loss.reshape(())), 1
        else:
            row.loss = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
        self._waiting.append(row)
        while len(self._waiting) > ROWS_MAX:
            self._settle(self._waiting[0], None)

    def numbers(self) -> tuple[float, float]:
        """This rank's part of the loss of the newest step whose loss can be read without waiting."""
        self._sent = self._waiting[-1 - self._lag] if len(self._waiting) > self._lag else None
        return self._sent.numbers() if self._sent is not None else (0.0, 0.0)

    def arrived(self, sums: Sequence[float]) -> None:
        """The sums over all ranks of what `numbers` gave last."""
        sent, self._sent = self._sent, None
        if sent is not None and sent in self._waiting:
            self._settle(sent, _mean(*sums))

    def enter(self, newest: Row | None) -> None:
        """A new generation begins, after the step of `newest`, whose loss can still be told by those who committed it
        and are still there; None: not live. Every rank waits for it: rank 0 may die before it is written."""
        self._sent = None
        mine = self._waiting[-1] if self._waiting else None
        here = (
            newest is not None
            and mine is not None
            and (mine.step, mine.generation) == (newest.step, newest.generation)
        )
        for old in list(self._waiting)[: -1 if here else None]:
            self._settle(old, None)
        if newest is not None and not here:
            self._waiting.append(newest)

    def known(self) -> list[tuple[Row, float | None]]:
        """The waiting rows, and their losses where this rank alone knows them."""
        return [(row, self._alone(row)) for row in self._waiting]

    def tell(self) -> Told:
        """What this rank still has, for the end of the job."""
        told: Told = []
        for row in self._waiting:
            part, share = row.numbers()
            told.append([row.step, part if math.isfinite(part) else None, share])
        return told

    def end(self, told: Iterable[Told]) -> None:
        """No step follows: complete what is left with what all ranks told, or those that could."""
        sums: dict[int, tuple[float, float]] = {}
        for step, part, share in (item for rank in told for item in rank):
            known = sums.get(int(step or 0), (0.0, 0.0))
            sums[int(step or 0)] = (
                known[0] + (math.nan if part is None else part),
                known[1] + (share or 0.0),
            )
        for row in list(self._waiting):
            self._settle(row, _mean(*sums.get(row.step, (0.0, 0.0))))

    @staticmethod
    def _alone(row: Row) -> float | None:
        return _mean(*row.numbers()) if row.share >= 1.0 else None

    def _settle(self, row: Row, mean: float | None) -> None:
        """Write `row`; those before it that are still here will not be known any more."""
        while self._waiting:
            oldest = self._waiting.popleft()
            known = mean if oldest is row else None
            self._write(oldest, self._alone(oldest) if known is None else known)
            if oldest is row:
                return


def _mean(total: float, share: float) -> float | None:
    return total / share if share > 0 and math.isfinite(total) else None


def require_number(name: str, value: Any) -> None:
    """Raises MisuseError unless `value` is one real number, in a tensor or not, or None. Looks at no device."""
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return
        got = f"a tensor of {value.dtype} and shape {list(value.shape)}"
    elif value is None or _floats(value):
        return
    else:
        got = f"a {type(value).__name__}"
    raise MisuseError(
        f"job.commit({name}=…): {got} is no number",
        valid="a number, or a tensor of one element",
        do=f"{name}.mean()" if isinstance(value, Tensor) and not value.is_complex() else "",
    )


def _floats(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str | bytes)
