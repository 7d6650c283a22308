"""Ranks check a snapshot together, through the store of their generation."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import DistStoreError, HashStore

from autoglm_elastic.training.checking import Asking, follow

WAIT_S = 20.0
PLAN = {"plan": {"tier": "disk"}, "names": ["model"]}


def check(
    entries: Sequence[str], wrong: dict[tuple[str, int], str], world: int = 3
) -> tuple[list[str], set[str]]:
    """What rank 0 hears of each of `entries`, and the parts that were read. `wrong`: by entry and rank."""
    store, read = HashStore(), set()
    store.set_timeout(timedelta(seconds=WAIT_S))

    def verify(entry: str, part: int, parts: int) -> str:
        assert parts == world
        read.add(f"{entry} {part}")
        return wrong.get((entry, part), "")

    with ThreadPoolExecutor(world) as pool:
        others = [pool.submit(follow, store, rank, world, verify) for rank in range(1, world)]
        asking = Asking(store, world, verify)
        told = [asking.verify(entry) for entry in entries]
        asking.end(PLAN)
        assert [other.result(WAIT_S) for other in others] == [PLAN] * (world - 1)
    return told, read


def test_every_rank_reads_its_part_and_then_hears_the_plan() -> None:
    assert check(["9-g1"], {}) == ([""], {"9-g1 0", "9-g1 1", "9-g1 2"})
    assert check([], {}) == ([], set()), "nobody reads for a live state"


@pytest.mark.parametrize("rank", range(3))
def test_what_any_rank_finds_rejects_the_snapshot_and_the_next_is_checked(rank: int) -> None:
    told, read = check(["9-g1", "8-g1"], {("9-g1", rank): "pack a: its digest differs"})
    assert told == ["pack a: its digest differs", ""]
    assert len(read) == 6


def test_a_rank_that_does_not_answer_is_waited_for_with_a_bound() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises((DistStoreError, RuntimeError)):
        Asking(store, 2, lambda entry, part, parts: "").verify("9-g1")
