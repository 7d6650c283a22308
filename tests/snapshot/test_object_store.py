"""Snapshots in an object store: saved, listed, verified and loaded by URL; a torn one does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from object_store import Bucket, Fault, Proxy, Request

from autoglm_elastic.core.lineage import GenerationRecord
from autoglm_elastic.ports import Outcome
from autoglm_elastic.snapshot import CheckpointManager

WAIT_S = 60.0


def state(value: float) -> dict[str, object]:
    return {
        "weight": torch.full((700, 700), value),
        "step": int(value),
        "large": torch.full((5 << 20,), value),
    }


@pytest.fixture(params=["s3", "memory"])
def url(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("bucket").url if request.param == "s3" else "memory://snapshots/run"


def test_a_snapshot_goes_there_and_comes_back(url: str) -> None:
    with CheckpointManager(url) as manager:
        assert manager.put_generation(GenerationRecord(0, -1, -1, None, "fresh")) is Outcome.OK
        for step in (1, 2):
            result = manager.save(step, state(step)).wait(WAIT_S)
            assert result.committed, result.reason
    with CheckpointManager(url) as manager:
        assert [entry.step for entry in manager.entries()] == [1, 2]
        newest = manager.newest_verified()
        assert newest is not None
        loaded = state(0)
        report = manager.load(loaded)
    assert (newest.step, report.step, loaded["step"]) == (2, 2, 2)
    assert all(torch.equal(loaded[name], state(2)[name]) for name in ("weight", "large"))


def entry_put(request: Request) -> bool:
    return request.method == "PUT" and re.search(r"catalog/", request.path) is not None


def test_a_commit_whose_answer_is_lost_is_a_commit(bucket: Bucket, proxy: Proxy) -> None:
    with CheckpointManager(bucket.url) as manager:
        proxy.faults = [Fault(entry_put, answer=500)]
        result = manager.save(1, state(1)).wait(WAIT_S)
        assert result.committed, result.reason
        assert proxy.faults[0].seen.is_set()


@pytest.mark.long
def test_a_commit_that_does_not_arrive_is_none(
    bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointManager(bucket.url) as manager:
        assert manager.save(1, state(1)).wait(WAIT_S).committed
        proxy.faults = [Fault(entry_put, times=99, forward=False, answer=0)]
        assert not manager.save(2, state(2)).wait(WAIT_S).committed
        proxy.faults = []
        newest = manager.newest_verified()
        assert newest is not None
        assert newest.step == 1


def test_a_store_that_ignores_conditions_takes_no_snapshot(bucket: Bucket, proxy: Proxy) -> None:
    proxy.faults = [Fault(lambda request: request.method == "PUT", times=99, strip="if-none-match")]
    with CheckpointManager(bucket.url) as manager:
        result = manager.save(1, state(1)).wait(WAIT_S)
    assert not result.committed
    assert "ignores conditional writes" in result.reason
    assert bucket.objects() == []


def test_the_objects_are_the_files_of_a_run_directory(bucket: Bucket, tmp_path: Path) -> None:
    """What is copied out of a bucket is a run directory."""
    with CheckpointManager(bucket.url) as manager:
        assert manager.save(1, state(1)).wait(WAIT_S).committed
    for key in bucket.objects():
        target = tmp_path / key
        target.parent.mkdir(parents=True, exist_ok=True)
        bucket.client.download_file(bucket.name, key, str(target))
    loaded = state(0)
    with CheckpointManager(tmp_path / "run") as manager:
        manager.load(loaded)
    assert loaded["step"] == 1
