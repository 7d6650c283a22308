"""What the ranks agree on at each step boundary, without a collective of its own.

Every rank contributes a few numbers: whether it wants to leave at a boundary (a planned world waits), whether
it wants to stop, whether a snapshot is due (rank 0 decides by time and step, any rank may ask), and its part
of the loss of a step before (rows.py). Their sums reach all ranks with the gradients of the step; where no
gradients are reduced here (FSDP), a tiny all-reduce started at one commit and completed at the next carries
them. So all ranks see the same decision at the same commit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist

from autoglm_elastic.training import rows

WANTS: Final = 3
SLOTS: Final = WANTS + rows.NUMBERS


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks do at this boundary. `loss`: the sums of what `Rows.numbers` gave, if they came."""

    leave: bool = False
    stop: bool = False
    snapshot: bool = False
    loss: tuple[float, ...] | None = None


class StepControl:
    """One per generation. `wants(boundary)` gives this rank's numbers for the boundary after which
    `boundary` steps are committed."""

    def __init__(self, world_size: int, wants: Callable[[int], Sequence[float]]) -> None:
        self._alone = world_size == 1
        self._wants = wants
        self._arrived: list[float] | None = None
        self._travelling: tuple[torch.Tensor, Any] | None = None
        self.failure: BaseException | None = None

    def slots(self, boundary: int) -> Sequence[float]:
        """This rank's contribution, to be summed over all ranks."""
        return self._wants(boundary)

    def arrived(self, sums: Sequence[float]) -> None:
        """The sums have come with this step's gradients."""
        known = self._arrived or [0.0] * SLOTS
        self._arrived = [a + b for a, b in zip(known, sums, strict=True)]

    def poison(self, failure: BaseException) -> None:
        """A collective of this step failed: it cannot be committed, whatever the user's code makes of the
        error."""
        self.failure = self.failure or failure

    def decide(self, boundary: int) -> Decision:
        """What all ranks do at this boundary. Raises what the collective that carries it raises."""
        sums: Sequence[float] = self._arrived or [0.0] * SLOTS
        came = self._alone or self._arrived is not None or self._travelling is not None
        if self._alone:
            sums = self._wants(boundary)
        if self._travelling is not None:
            tensor, work = self._travelling
            self._travelling = None
            work.wait()
            sums = [a + b for a, b in zip(sums, tensor.tolist(), strict=True)]
        leave, stop, snapshot = (value > 0 for value in sums[:WANTS])
        return Decision(leave, stop, snapshot, tuple(sums[WANTS:]) if came else None)

    def begin(self, boundary: int) -> None:
        """No gradients will carry the wants for the generation's first boundary."""
        if self._travelling is None:
            self.depart(boundary)

    def depart(self, boundary: int) -> None:
        """Done with a boundary: send the wants for the next one, `boundary`, unless gradients carry them."""
        carried, self._arrived = self._arrived is not None, None
        if not (carried or self._alone):
            tensor = torch.tensor(self._wants(boundary), dtype=torch.float32)
            self._travelling = (tensor, dist.all_reduce(tensor, async_op=True))
