"""Ranks that load together: each byte is read once, and what goes wrong at one is told to all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.object_store import CREDENTIALS, Bucket
from tests.snapshot.ranks import Ranks
from tests.snapshot.test_ranks import KILLED, LAYOUTS

pytestmark = pytest.mark.long

REPLICATED = {"dims": [3], "placements": ["R"]}
STATE_NBYTES = 600_000 * 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    helper = Ranks()
    yield helper
    helper.close()


@pytest.fixture
def saved(ranks: Ranks, tmp_path: Path) -> Path:
    ranks.values("reshard", 3, tmp_path, load=None, save=0, **REPLICATED)
    return tmp_path


def test_replicas_read_a_part_each(ranks: Ranks, saved: Path) -> None:
    read = [nbytes for nbytes, _ in ranks.values("together", 3, saved, load=0, **REPLICATED)]
    assert STATE_NBYTES < sum(read) < 1.02 * STATE_NBYTES
    assert max(read) < 0.45 * sum(read)


@pytest.mark.parametrize(
    "layout", ["2", "3 columns", pytest.param("2 replicas of 2 shards", marks=pytest.mark.long)]
)
def test_ranks_that_want_different_things_read_for_themselves(ranks: Ranks, saved: Path, layout: str) -> None:
    dims, placements = LAYOUTS[layout]
    world = torch.Size(dims).numel()
    results = ranks.values("together", world, saved, load=0, dims=dims, placements=placements)
    assert [error for _, error in results] == [""] * world
    if layout == "2 replicas of 2 shards":
        pairs = results[0][0] + results[2][0], results[1][0] + results[3][0]
        assert max(nbytes for nbytes, _ in results) < 0.8 * max(pairs)


def test_a_damaged_byte_in_one_share_is_everybodys_error(ranks: Ranks, saved: Path) -> None:
    largest = max((saved / "run").glob("packs/*/*"), key=os.path.getsize)
    with largest.open("r+b") as pack:
        pack.seek(-1000, os.SEEK_END)
        byte = pack.read(1)
        pack.seek(-1, os.SEEK_CUR)
        pack.write(bytes([byte[0] ^ 1]))
    results = ranks.values("together", 3, saved, load=0, **REPLICATED)
    errors = [error for _, error in results]
    assert all(error.startswith("CorruptSnapshot: ") and "its digest differs" in error for error in errors)
    assert sum("CorruptSnapshot: rank " in error for error in errors) == 2, "the others say who found it"


def test_a_member_that_dies_is_an_error_and_no_wait(ranks: Ranks, saved: Path) -> None:
    first, dead, last = ranks.run("together", 3, saved, load=0, how="dies", **REPLICATED)
    assert dead.status == KILLED
    for one in (first, last):
        assert one.status == 0, one.error
        assert "PlatformError: reading a snapshot together: " in one.value[1]


def test_a_rank_whose_state_does_not_fit_keeps_nobody_waiting(ranks: Ranks, saved: Path) -> None:
    first, misfit, last = ranks.values("together", 3, saved, load=0, how="misfit", **REPLICATED)
    assert misfit[1].startswith("UsageError: ")
    assert (first[1], last[1]) == ("", "")
    assert STATE_NBYTES < first[0] + last[0] < 1.02 * STATE_NBYTES


def test_from_an_object_store_it_is_the_default(ranks: Ranks, tmp_path: Path, bucket: Bucket) -> None:
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": bucket.endpoint}
    results = ranks.values("from_store", 2, tmp_path, url=bucket.url, environment=environment)
    assert sum(results) < 1.02 * STATE_NBYTES
    assert max(results) < 0.6 * sum(results)
