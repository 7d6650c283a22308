"""Ranks that want the same read a part each: over real gloo groups, with faults in every member's part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from object_store import CREDENTIALS, Bucket, Proxy, packs_read

from autoglm_elastic.snapshot import CheckpointManager
from tests.snapshot.loads import blank, seed_of, state, tensors_of
from tests.snapshot.ranks import Ranks

NBYTES = sum(tensor.nbytes for tensor in tensors_of(state(0)))
SLACK = 128 << 10
"""A share is uneven by about a run (here 64 KiB)."""
KILLED = -9
PROMPT_S = 10.0
"""Far below the bound of a wait in these worlds (30 s): whoever is told within it was told at once."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    helper = Ranks()
    yield helper
    helper.close()


@pytest.mark.parametrize("world", [2, 3])
def test_replicas_read_a_part_each(ranks: Ranks, tmp_path: Path, world: int) -> None:
    ranks.values("loads.save", 2, tmp_path, seeds=[1, 2])
    loaded = ranks.values("loads.load", world, tmp_path, how=True)
    assert [seed for seed, _, _ in loaded] == [2] * world
    assert sum(counted for _, counted, _ in loaded) == NBYTES
    for _, counted, reported in loaded:
        assert counted == reported
        assert abs(counted - NBYTES / world) < SLACK


def test_a_directory_is_read_by_everybody_unless_told_otherwise(ranks: Ranks, tmp_path: Path) -> None:
    ranks.values("loads.save", 2, tmp_path, seeds=[1])
    assert ranks.values("loads.load", 2, tmp_path, how=None) == [[1, NBYTES, NBYTES]] * 2
    with CheckpointManager(tmp_path / "run") as manager:
        target = blank()
        assert manager.load(target, together=True).nbytes == NBYTES
        assert seed_of(target) == 1


def test_large_tensors_travel_in_many_messages(ranks: Ranks, tmp_path: Path) -> None:
    nbytes = 40 << 20
    loaded = ranks.values("loads.load_large", 2, tmp_path, nbytes=nbytes)
    assert [right for right, _ in loaded] == [True] * 2
    assert sum(read for _, read in loaded) == nbytes


@pytest.mark.parametrize(
    ("dims", "placements", "copies"),
    [
        ([2], ["0"], 1),
        pytest.param([2, 2], ["R", "0"], 2, marks=pytest.mark.long),
        pytest.param([2, 2], ["R", "1"], 2, marks=pytest.mark.long),
    ],
    ids=["FSDP: nobody shares", "HSDP: two replicas", "HSDP by columns"],
)
def test_ranks_share_with_those_of_the_same_shard(
    ranks: Ranks, tmp_path: Path, dims: list[int], placements: list[str], copies: int
) -> None:
    loaded = ranks.values(
        "loads.reshard", torch.Size(dims).numel(), tmp_path, dims=dims, placements=placements
    )
    assert all(right for right, _, _ in loaded)
    assert all(abs(read - wanted / copies) < SLACK for _, read, wanted in loaded)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_corrupt_chunk_fails_all_and_leaves_them_able_to_load_another(
    ranks: Ranks, tmp_path: Path, world: int
) -> None:
    ranks.values("loads.save", 1, tmp_path, seeds=[1])
    old = set((tmp_path / "run").glob("packs/*/*"))
    ranks.values("loads.save", 1, tmp_path, seeds=[2])
    (pack,) = set((tmp_path / "run").glob("packs/*/*")) - old
    data = bytearray(pack.read_bytes())
    data[-NBYTES // 4] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)
    outcomes = ranks.values("loads.fail", world, tmp_path, rank=0, how="nothing else")
    for kind, text, took, again, _ in outcomes:
        assert kind == "CorruptSnapshot"
        assert "its digest differs" in text
        assert took < PROMPT_S
        assert again == 1
    assert sum(text.startswith("rank ") for _, text, *_ in outcomes) == world - 1


FAILURES = {
    "error": ("PlatformError", "Input/output error"),
    "bug": ("PlatformError", "ValueError: nobody thought of that"),
    "transit": ("CorruptSnapshot", "was damaged on its way"),
}


@pytest.mark.parametrize(
    "how", ["error", *(pytest.param(how, marks=pytest.mark.long) for how in ("bug", "transit"))]
)
def test_what_fails_one_fails_all_and_the_next_load_works(ranks: Ranks, tmp_path: Path, how: str) -> None:
    ranks.values("loads.save", 1, tmp_path, seeds=[1, 2])
    kind, says = FAILURES[how]
    outcomes = ranks.values("loads.fail", 3, tmp_path, rank=1, how=how)
    if how == "bug":
        assert outcomes.pop(1)[:2] == ["ValueError", "nobody thought of that"]
    for found, text, took, again, _ in outcomes:
        assert (found, again) == (kind, 1)
        assert says in text
        assert took < PROMPT_S


def test_a_member_that_is_killed_is_missed_by_all_at_once(ranks: Ranks, tmp_path: Path) -> None:
    """Also by those who exchange nothing with it."""
    ranks.values("loads.save", 1, tmp_path, seeds=[1])
    outcomes = ranks.run("loads.fail", 4, tmp_path, rank=1, how="kill")
    assert outcomes.pop(1).status == KILLED
    for outcome in outcomes:
        assert outcome.status == 0, outcome.error
        kind, text, took, *_ = outcome.value
        assert kind == "PlatformError"
        assert "reading a snapshot together: " in text
        assert took < PROMPT_S


def test_a_member_that_is_stopped_is_waited_for_with_a_bound(ranks: Ranks, tmp_path: Path) -> None:
    ranks.values("loads.save", 1, tmp_path, seeds=[1])
    outcomes = ranks.run("loads.fail", 2, tmp_path, rank=1, how="stop")
    assert [one.status for one in outcomes] == [0, KILLED], outcomes
    kind, text, took, *_ = outcomes[0].value
    assert kind == "PlatformError"
    assert "rank 1" in text
    assert took < PROMPT_S


def test_a_bucket_is_read_once_for_all_replicas(
    ranks: Ranks, tmp_path: Path, bucket: Bucket, proxy: Proxy
) -> None:
    with CheckpointManager(bucket.url) as manager:
        assert manager.save(1, state(1)).wait(60.0).committed
    proxy.requests.clear()
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": proxy.endpoint}
    arguments = {"url": bucket.url, "environment": environment}
    loaded = ranks.values("loads.load", 2, tmp_path, how=None, **arguments)
    assert [seed for seed, _, _ in loaded] == [1] * 2
    assert all(counted < 0.75 * NBYTES for _, counted, _ in loaded)
    once, headers = packs_read(proxy.requests), 2 * (64 << 10)
    assert NBYTES <= once < NBYTES + headers
    proxy.requests.clear()
    loaded = ranks.values("loads.load", 2, tmp_path, how=False, **arguments)
    assert [counted for _, counted, _ in loaded] == [NBYTES] * 2
    assert packs_read(proxy.requests) >= 2 * NBYTES
