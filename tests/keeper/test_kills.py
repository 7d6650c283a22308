"""Real kills: of ranks, of the keeper at each of its failpoints. The old recovery point or the new one, never a
mixture; nobody waits for the dead."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from autoglm_elastic.catalog.failpoints import ENV_FAILPOINT
from autoglm_elastic.core.commit import Snapshot, Verdict
from autoglm_elastic.keeper import Keeper, KeeperGone
from tests.keeper.conftest import Ensure, Watch
from tests.keeper.ranks import Rank
from tests.keeper.state import Share, committed, records

WAIT_S = 60.0

StartRank = Callable[..., Rank]


@pytest.mark.parametrize("world_size", [1, 2])
def test_staged_everywhere_and_killed_is_committed(
    start_rank: StartRank, watch: Watch, run_dir: Path, world_size: int
) -> None:
    ranks = [start_rank(rank, world_size) for rank in range(world_size)]
    for rank in ranks:
        assert rank.ask("stage", 1) == "staged"
    for rank in ranks:
        assert rank.ask("write", 1) == "writing"
    for rank in ranks:
        rank.process.send_signal(signal.SIGKILL)
    for rank in ranks:
        rank.close()
    assert watch.ended(ranks[0].keeper_pid)
    assert committed(run_dir) == [1]
    assert records(run_dir) == []


def test_one_killed_and_one_that_cannot_decide(start_rank: StartRank, ensure: Ensure, run_dir: Path) -> None:
    dying = start_rank(1, 2)
    keeper = ensure(rank=0, world_size=2)
    Share(rank=0, world_size=2).save(keeper, Snapshot(1, 1)).wait(WAIT_S)
    dying.ask("stage", 1)
    dying.ask("write", 1)
    dying.kill()
    keeper.settled(Snapshot(1, 1), Verdict.UNKNOWN)
    assert keeper.settle(WAIT_S)
    assert committed(run_dir) == [1]


def test_what_was_not_staged_everywhere_is_not_committed(
    start_rank: StartRank, ensure: Ensure, run_dir: Path
) -> None:
    ranks = [start_rank(rank, 2, linger_s=60) for rank in range(2)]
    ranks[0].ask("stage", 1)
    ranks[0].ask("write", 1)
    ranks[1].ask("stage", 1)
    for rank in ranks:
        rank.kill()
    keeper = ensure()
    assert keeper.settle(WAIT_S)
    assert committed(run_dir) == []
    assert records(run_dir) == [1]
    Share().save(keeper, Snapshot(2, 2)).wait(WAIT_S)
    keeper.settled(Snapshot(2, 2), Verdict.UNKNOWN)
    assert keeper.settle(WAIT_S)
    assert committed(run_dir) == [2]
    assert records(run_dir) == []
    os.kill(keeper.pid, signal.SIGTERM)


def test_a_child_of_a_dead_rank_does_not_keep_it_alive(
    start_rank: StartRank, watch: Watch, run_dir: Path
) -> None:
    rank = start_rank()
    child = int(rank.ask("child", 0))
    try:
        rank.ask("stage", 1)
        rank.ask("write", 1)
        rank.kill()
        assert watch.ended(rank.keeper_pid)
        assert committed(run_dir) == [1]
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_aborted_snapshot_is_not_finished(start_rank: StartRank, watch: Watch, run_dir: Path) -> None:
    rank = start_rank()
    rank.ask("stage", 1)
    rank.ask("write", 1)
    rank.ask("decide", 1, "abort")
    rank.kill()
    assert watch.ended(rank.keeper_pid)
    assert committed(run_dir) == []
    assert not list((run_dir / "packs").rglob("*.safetensors"))


WRITING = ("job_taken", "pack_written")
FINISHING = ("prepared_put", "manifest_written", "entry_put", "announced", "hints_moved")


@pytest.mark.parametrize("point", WRITING)
def test_a_killed_keeper_fails_the_snapshot_at_once(
    ensure: Ensure, run_dir: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setenv(ENV_FAILPOINT, f"{point}:kill")
    keeper = ensure()
    pending = Share().save(keeper, Snapshot(1, 1))
    with pytest.raises(KeeperGone, match="process"):
        pending.wait(WAIT_S)
    assert keeper.gone
    assert not keeper.settle(WAIT_S)
    with pytest.raises(KeeperGone):
        keeper.segment(1)
    monkeypatch.delenv(ENV_FAILPOINT)
    _save(ensure(), 2)
    assert committed(run_dir) == [2]


@pytest.mark.parametrize("point", FINISHING)
def test_a_keeper_killed_while_it_finishes_leaves_old_or_new(
    ensure: Ensure, run_dir: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    _save(ensure(), 1)
    ensure().close()
    monkeypatch.setenv(ENV_FAILPOINT, f"{point}:kill")
    keeper = _another(ensure)
    Share().save(keeper, Snapshot(2, 1)).wait(WAIT_S)
    keeper.settled(Snapshot(2, 1), Verdict.UNKNOWN)
    assert not keeper.settle(WAIT_S)
    after_the_commit = FINISHING.index(point) >= FINISHING.index("entry_put")
    assert committed(run_dir) == ([1, 2] if after_the_commit else [1])
    monkeypatch.delenv(ENV_FAILPOINT)
    _save(ensure(), 3)
    assert committed(run_dir)[-1] == 3
    assert records(run_dir) == []


def _another(ensure: Ensure) -> Keeper:
    """A keeper that is started now: the one before ends first."""
    before = ensure()
    os.kill(before.pid, signal.SIGKILL)
    before.wait_gone()
    return ensure()


def _save(keeper: Keeper, step: int) -> None:
    Share().save(keeper, Snapshot(step, 1)).wait(WAIT_S)
    keeper.settled(Snapshot(step, 1), Verdict.UNKNOWN)
    assert keeper.settle(WAIT_S)


def test_a_bug_in_a_writing_thread_is_told(
    ensure: Ensure, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_FAILPOINT, "pack_written:raise")
    keeper = ensure()
    with pytest.raises(Exception, match="planted by a test"):
        Share().save(keeper, Snapshot(1, 1)).wait(WAIT_S)
    assert not list((run_dir / "packs").rglob("*.safetensors"))


def test_a_bug_while_finishing_is_told(ensure: Ensure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_FAILPOINT, "manifest_written:raise")
    keeper = ensure()
    Share().save(keeper, Snapshot(1, 1)).wait(WAIT_S)
    keeper.settled(Snapshot(1, 1), Verdict.UNKNOWN)
    assert keeper.settle(WAIT_S)
