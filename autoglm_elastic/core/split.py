"""Who takes which samples: the global batch and the order of samples do not depend on the world.

Positions are places in an epoch's order of samples, which is a function of the seed and the epoch only. A
step takes the next `batch` positions; the ranks share them in contiguous runs. So a cursor says all that a
resumed job needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise


def even(total: int, parts: int) -> list[tuple[int, int]]:
    """`total` items in `parts` contiguous runs `(start, stop)`, as even as possible, the longer ones first.

    A part may be empty. Raises ValueError for a negative total or no parts.
    """
    if total < 0 or parts < 1:
        raise ValueError(f"cannot split {total} items into {parts} parts")
    size, longer = divmod(total, parts)
    bounds = [part * size + min(part, longer) for part in range(parts + 1)]
    return list(pairwise(bounds))


def global_batch(step_in_epoch: int, batch: int, dataset_size: int) -> tuple[int, int]:
    """Positions `(start, stop)` of a step's global batch; the last of an epoch may be short, beyond it is
    empty.

    Raises ValueError for a negative step or size or a batch below 1.
    """
    if step_in_epoch < 0 or batch < 1 or dataset_size < 0:
        raise ValueError(f"no batch {step_in_epoch} of {batch} in {dataset_size} samples")
    start = min(step_in_epoch * batch, dataset_size)
    return start, min(start + batch, dataset_size)


@dataclass(frozen=True, slots=True)
class Cursor:
    """The next position to be taken: `sample` within `epoch`, whose order follows from `seed` and `epoch`."""

    epoch: int
    sample: int
    seed: int


def batch_at(cursor: Cursor, dataset_size: int, batch: int, drop_last: bool) -> tuple[int, int]:
    """Positions `(start, stop)` of the global batch at a cursor; never empty for a cursor that `advance`
    returned.

    With `drop_last` what is left of an epoch and too short for a batch is never taken. Raises ValueError when
    there is no batch at all (an empty data set, or a smaller one than a batch with `drop_last`).
    """
    _require_a_batch(dataset_size, batch, drop_last)
    stop = min(cursor.sample + batch, dataset_size)
    if stop - cursor.sample < (batch if drop_last else 1):
        return cursor.sample, cursor.sample
    return cursor.sample, stop


def advance(cursor: Cursor, dataset_size: int, batch: int, drop_last: bool) -> Cursor:
    """The cursor after the batch at it; at the end of an epoch the start of the next one. Raises as
    `batch_at`."""
    _, stop = batch_at(cursor, dataset_size, batch, drop_last)
    left = dataset_size - stop
    if left < (batch if drop_last else 1):
        return replace(cursor, epoch=cursor.epoch + 1, sample=0)
    return replace(cursor, sample=stop)


def weight(local: int, global_: int) -> float:
    """The share of a rank's mean in the global mean. Raises ValueError unless 0 <= local <= global and global
    > 0."""
    if not 0 <= local <= global_ or global_ < 1:
        raise ValueError(f"a rank cannot have {local} of {global_} samples")
    return local / global_


def _require_a_batch(dataset_size: int, batch: int, drop_last: bool) -> None:
    if batch < 1 or dataset_size < (batch if drop_last else 1):
        last = ", incomplete batches dropped" if drop_last else ""
        raise ValueError(f"a data set of {dataset_size} samples has no batch of {batch}{last}")
