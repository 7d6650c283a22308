"""What a rank stages becomes durable files that verify, or an error."""

from __future__ import annotations

from pathlib import Path

from autoglm_elastic.core.commit import Snapshot, Verdict
from tests.keeper.conftest import Ensure
from tests.keeper.state import Share, committed

WAIT_S = 60.0


def test_packs_are_durable_when_the_wait_returns(ensure: Ensure, run_dir: Path) -> None:
    keeper = ensure()
    share = Share()
    packs = share.save(keeper, Snapshot(1, 1)).wait(WAIT_S)
    assert len(packs) == len(share.images)
    for pack in packs:
        path = run_dir / "packs" / pack.sha256[:2] / f"{pack.sha256}.safetensors"
        assert path.stat().st_size == pack.nbytes
    keeper.settled(Snapshot(1, 1), Verdict.COMMIT)
    assert not list((run_dir / "tmp").iterdir())


def test_a_segment_is_used_again(ensure: Ensure) -> None:
    keeper = ensure()
    share = Share()
    numbers = []
    for step in (1, 2, 3):
        segment = keeper.segment(share.nbytes)
        numbers.append(segment.number)
        share.fill(segment, step)
        keeper.write(share.job(Snapshot(step, 1), segment)).wait(WAIT_S)
        keeper.settled(Snapshot(step, 1), Verdict.COMMIT)
    assert len(set(numbers)) == 1


def test_an_abort_takes_the_packs_back(ensure: Ensure, run_dir: Path) -> None:
    keeper = ensure()
    share = Share()
    share.save(keeper, Snapshot(1, 1)).wait(WAIT_S)
    kept = {path.name for path in (run_dir / "packs").rglob("*.safetensors")}
    keeper.settled(Snapshot(1, 1), Verdict.COMMIT)
    share.save(keeper, Snapshot(2, 1)).wait(WAIT_S)
    keeper.settled(Snapshot(2, 1), Verdict.ABORT)
    assert keeper.settle(WAIT_S)
    assert {path.name for path in (run_dir / "packs").rglob("*.safetensors")} == kept


def test_what_a_rank_cannot_decide_the_keeper_finishes(ensure: Ensure, run_dir: Path) -> None:
    keeper = ensure()
    Share().save(keeper, Snapshot(1, 1))
    keeper.settled(Snapshot(1, 1), Verdict.UNKNOWN)
    assert keeper.settle(WAIT_S)
    assert committed(run_dir) == [1]


def test_one_rank_of_two_is_not_enough(ensure: Ensure, run_dir: Path) -> None:
    first, second = (ensure(rank=rank, world_size=2) for rank in (0, 1))
    Share(rank=0, world_size=2).save(first, Snapshot(1, 1))
    first.settled(Snapshot(1, 1), Verdict.UNKNOWN)
    assert first.settle(WAIT_S)
    assert committed(run_dir) == []
    Share(rank=1, world_size=2).save(second, Snapshot(1, 1))
    second.settled(Snapshot(1, 1), Verdict.UNKNOWN)
    assert second.settle(WAIT_S)
    assert committed(run_dir) == [1]
