"""The order of samples: a function of the job's seed and the epoch, whatever the world.

A step takes the next `global_batch_size` positions of the epoch's order and the ranks share them in
contiguous runs. The cursor moves when the step commits, so along the job's line of descent every sample is
taken exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, default_collate

from autoglm_elastic.core.split import Cursor, advance, batch_at, even
from autoglm_elastic.training.outcomes import MisuseError
from autoglm_elastic.training.rng import derive


class MapDataset(Sized, Protocol):
    def __getitem__(self, index: int, /) -> Any: ...


class Batches:
    """An iterator over this rank's shares of the global batches, from a cursor to the end of the last epoch.

    Args:
        rank, world_size: whose share.
        cursor: where to begin.
        taken: called as each batch is handed out, with the cursor after it, and this rank's and all samples
            in it.
    """

    def __init__(
        self,
        dataset: MapDataset,
        *,
        global_batch_size: int,
        epochs: int,
        shuffle: bool,
        drop_last: bool,
        num_workers: int,
        collate_fn: Callable[[list[Any]], Any] | None,
        rank: int,
        world_size: int,
        cursor: Cursor,
        taken: Callable[[Cursor, int, int], None],
    ) -> None:
        size = len(dataset)
        if global_batch_size < 1 or size < (global_batch_size if drop_last else 1):
            raise MisuseError(
                f"job.batches: no batch of {global_batch_size} in a data set of {size} samples",
                valid="global_batch_size from 1 up to the size of the data set",
            )
        self._dataset = dataset
        self._size, self._batch, self._epochs = size, global_batch_size, epochs
        self._shuffle, self._drop_last = shuffle, drop_last
        self._num_workers = num_workers
        self._collate = default_collate if collate_fn is None else collate_fn
        self._rank, self._world_size = rank, world_size
        self._cursor = cursor
        self._taken = taken
        self._order: tuple[int, torch.Tensor] | None = None

    def __iter__(self) -> Iterator[Any]:
        indices = (list(share) for share, _, _, _ in self._shares(self._cursor))
        shares = self._shares(self._cursor)
        for batch in self._fetch(indices):
            _, after, local, total = next(shares)
            self._taken(after, local, total)
            yield batch

    def _fetch(self, indices: Iterator[list[int]]) -> Iterator[Any]:
        if self._num_workers == 0:
            return map(self._get, indices)
        generator = torch.Generator()
        generator.manual_seed(derive(self._cursor.seed, self._rank))
        return iter(
            DataLoader(
                self._dataset,  # type: ignore[arg-type]  # a map-style dataset need not derive from Dataset
                batch_sampler=indices,
                num_workers=self._num_workers,
                collate_fn=self._collate,
                generator=generator,
            )
        )

    def _get(self, indices: list[int]) -> Any:
        many = getattr(self._dataset, "__getitems__", None)
        samples = many(indices) if callable(many) else [self._dataset[index] for index in indices]
        return self._collate(samples)

    def _shares(self, cursor: Cursor) -> Iterator[tuple[list[int], Cursor, int, int]]:
        """(indices, cursor after, samples here, samples everywhere). Without a sample of its own a rank gets
        the batch's first one, to take part with weight 0."""
        while cursor.epoch < self._epochs:
            start, stop = batch_at(cursor, self._size, self._batch, self._drop_last)
            first, last = even(stop - start, self._world_size)[self._rank]
            order = self._order_of(cursor)
            local = last - first
            here = order[start + first : start + last] if local else order[start : start + 1]
            cursor = advance(cursor, self._size, self._batch, self._drop_last)
            yield [int(index) for index in here], cursor, local, stop - start

    def _order_of(self, cursor: Cursor) -> torch.Tensor:
        if self._order is None or self._order[0] != cursor.epoch:
            if self._shuffle:
                generator = torch.Generator()
                generator.manual_seed(derive(cursor.seed, cursor.epoch))
                order = torch.randperm(self._size, generator=generator)
            else:
                order = torch.arange(self._size)
            self._order = (cursor.epoch, order)
        return self._order[1]
