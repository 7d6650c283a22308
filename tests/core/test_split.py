"""Every sample exactly once, at any world size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_elastic.core.split import Cursor, advance, batch_at, even, global_batch, weight


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_even_covers_everything_once_in_order_and_evenly(total: int, parts: int) -> None:
    runs = even(total, parts)
    assert len(runs) == parts
    assert [index for start, stop in runs for index in range(start, stop)] == list(range(total))
    sizes = [stop - start for start, stop in runs]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 200), st.integers(1, 50), st.booleans(), st.integers(1, 3))
def test_every_position_exactly_once_an_epoch(size: int, batch: int, drop_last: bool, epochs: int) -> None:
    if drop_last and size < batch:
        with pytest.raises(ValueError, match="has no batch"):
            advance(Cursor(0, 0, 0), size, batch, drop_last)
        return
    cursor = Cursor(0, 0, 7)
    taken: dict[int, list[int]] = {}
    steps = 0
    while cursor.epoch < epochs:
        start, stop = batch_at(cursor, size, batch, drop_last)
        assert 0 < stop - start <= batch
        taken.setdefault(cursor.epoch, []).extend(range(start, stop))
        cursor = advance(cursor, size, batch, drop_last)
        steps += 1
        assert steps <= epochs * size
    kept = size - size % batch if drop_last else size
    assert taken == {epoch: list(range(kept)) for epoch in range(epochs)}


@given(st.integers(0, 40), st.integers(1, 50), st.integers(0, 500))
def test_global_batch_is_where_the_cursor_is(step: int, batch: int, size: int) -> None:
    start, stop = global_batch(step, batch, size)
    assert 0 <= start <= stop <= size
    assert stop - start == max(0, min(batch, size - step * batch))


@given(st.integers(1, 500), st.integers(1, 64))
def test_the_weights_of_the_ranks_sum_to_one(batch: int, world: int) -> None:
    assert sum(weight(stop - start, batch) for start, stop in even(batch, world)) == pytest.approx(1.0)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot split"):
        even(3, 0)
    with pytest.raises(ValueError, match="no batch"):
        global_batch(0, 0, 3)
    with pytest.raises(ValueError, match="cannot have"):
        weight(3, 2)
