"""Workers die; the others stay alive and go on with nothing lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import Cluster, Zygote

from autoglm_elastic import wire


def undisturbed(zygote: Zygote, folder: Path, args: dict[str, Any], workers: int) -> list[dict[str, Any]]:
    folder.mkdir()
    with Cluster(zygote, folder, "train", args) as cluster:
        cluster.start(workers)
        cluster.wait_exits()
        return cluster.results()


def committed_indices(cluster: Cluster) -> dict[int, list[int]]:
    """Step → sample indices over all ranks, in the newest generation that got as far as its commit."""
    newest: dict[int, tuple[int, dict[int, list[int]]]] = {}
    for worker in cluster.all:
        for said in worker.said:
            if "trying" not in said:
                continue
            step, generation = said["trying"], said["generation"]
            if step not in newest or newest[step][0] < generation:
                newest[step] = (generation, {})
            if newest[step][0] == generation:
                newest[step][1][said["rank"]] = said["indices"]
    return {step: [i for rank in sorted(by) for i in by[rank]] for step, (_, by) in newest.items()}


EXTRAS = {"dropout": {"dropout": 0.2}, "norm": {"norm": True, "scheduler": True}, "far": {"far": True}}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_a_survivor_keeps_its_process_and_no_step_is_lost(
    zygote: Zygote, tmp_path: Path, extra: dict[str, Any]
) -> None:
    args = {"steps": 12, "die": {"rank": 1, "step": 6}} | extra
    with Cluster(zygote, tmp_path, "train", args) as cluster:
        cluster.start(2)
        survivor, doomed = cluster.alive
        cluster.wait_said(doomed, dying=6)
        cluster.kill(doomed)
        cluster.reform(add=1)
        cluster.wait_exits()
        results = cluster.results()
        assert cluster.alive[0] is survivor
        assert results[0]["entered"] == 2
        assert {r.from_step for r in cluster.resumed(1)} == {6}
        assert {r.tier for r in cluster.resumed(1)} == {"live"}
    calm = undisturbed(zygote, tmp_path / "calm", args | {"die": None}, 2)
    assert [r["digest"] for r in results] == [r["digest"] for r in calm]
    assert results[0]["digest"] == results[1]["digest"]


def test_rank_0_may_die_too(zygote: Zygote, tmp_path: Path) -> None:
    args = {"steps": 8, "die": {"rank": 0, "step": 3}}
    with Cluster(zygote, tmp_path, "train", args) as cluster:
        cluster.start(2)
        cluster.wait_said(cluster.alive[0], dying=3)
        cluster.kill(cluster.alive[0])
        cluster.reform(add=1)
        cluster.wait_exits()
        results = cluster.results()
    calm = undisturbed(zygote, tmp_path / "calm", args | {"die": None}, 2)
    assert {r["digest"] for r in results} == {r["digest"] for r in calm}


@pytest.mark.parametrize("newcomers", [0, 1])
def test_a_death_while_the_first_things_are_tracked_begins_anew(
    zygote: Zygote, tmp_path: Path, newcomers: int
) -> None:
    with Cluster(zygote, tmp_path, "tracked_one_by_one", {"steps": 3}) as cluster:
        cluster.start(3)
        for worker in cluster.alive:
            cluster.wait_said(worker, tracked=1)
        cluster.kill(cluster.alive[0])
        cluster.reform(add=newcomers)
        cluster.wait_exits()
        results = cluster.results()
    assert {r["tier"] for r in results} == {"fresh"}
    assert len({r["digest"] for r in results}) == 1


def test_four_three_two_four(zygote: Zygote, tmp_path: Path) -> None:
    """Every sample once an epoch, the same result, at any sequence of worlds; a planned world loses
    nothing."""
    args = {"steps": 20, "batch": 6, "size": 27, "holds": [[0, 3, 3], [1, 6, 2], [2, 10, -1]]}
    with Cluster(zygote, tmp_path, "train", args) as cluster:
        cluster.start(4)
        for held_at in (3, 6):
            doomed = cluster.alive[-1]
            cluster.wait_said(doomed, holding=held_at)
            cluster.kill(doomed)
            cluster.reform()
        cluster.wait_said(cluster.alive[0], waiting=10)
        cluster.reform(add=2, planned=True)
        cluster.say_go()
        cluster.wait_exits()
        results = cluster.results()
        assert len({r["digest"] for r in results}) == 1
        assert [r["entered"] for r in results] == [4, 4, 1, 1]
        assert {r.from_step for r in cluster.resumed(2)} == {6}
        assert min(r.from_step for r in cluster.resumed(3)) >= 10
        indices = committed_indices(cluster)
    per_epoch = 5
    for epoch in range(20 // per_epoch):
        taken = [i for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for i in indices[step + 1]]
        assert sorted(taken) == list(range(27))
    calm = undisturbed(zygote, tmp_path / "calm", {"steps": 20, "batch": 6, "size": 27}, 1)
    assert results[0]["weights"] == pytest.approx(calm[0]["weights"], rel=1e-4, abs=1e-5)


def test_more_ranks_than_samples_in_a_batch(zygote: Zygote, tmp_path: Path) -> None:
    args = {"steps": 6, "batch": 2, "size": 9}
    three = undisturbed(zygote, tmp_path / "three", args, 3)
    one = undisturbed(zygote, tmp_path / "one", args, 1)
    assert len({r["digest"] for r in three}) == 1
    assert three[0]["weights"] == pytest.approx(one[0]["weights"], rel=1e-5, abs=1e-6)


def test_a_peer_that_hangs_holds_nobody(zygote: Zygote, tmp_path: Path) -> None:
    """Its connections stay open, so only breaking the group frees the others."""
    args = {"steps": 9, "holds": [[0, 4, 2]]}
    with Cluster(zygote, tmp_path, "train", args) as cluster:
        cluster.start(3)
        hanging = cluster.alive[2]
        cluster.wait_said(hanging, holding=4)
        cluster.forget(hanging)
        for worker in cluster.alive:
            cluster.wait(lambda w=worker: wire.Unwound(0) in w.told, "unwound")
        cluster.reform(add=1)
        cluster.wait_exits()
        assert len({r["digest"] for r in cluster.results()}) == 1
        assert {(r.tier, r.from_step) for r in cluster.resumed(1)} == {("live", 4)}


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_group_of_the_users_own_holds_nobody(zygote: Zygote, tmp_path: Path, how: str) -> None:
    with Cluster(zygote, tmp_path, "grouped", {"steps": 6}) as cluster:
        cluster.start(3)
        lost = cluster.alive[1]
        cluster.wait_said(lost, holding=3)
        for worker in (cluster.alive[0], cluster.alive[2]):
            cluster.wait_said(worker, meeting=3)
        if how == "killed":
            cluster.kill(lost)
        else:
            cluster.forget(lost)
        cluster.reform(add=1)
        cluster.wait_exits()
        results = cluster.results()
        assert [r["entered"] for r in results] == [2, 2, 1]
        assert len({r["digest"] for r in results}) == 1


def test_sharded_state_grows_without_a_run_directory(zygote: Zygote, tmp_path: Path) -> None:
    args: dict[str, Any] = {"steps": 9, "shard": True, "frozen": True, "batch": 12}
    with Cluster(zygote, tmp_path, "train", args | {"holds": [[0, 4, -1]]}) as cluster:
        cluster.start(2)
        cluster.wait_said(cluster.alive[0], waiting=4)
        cluster.reform(add=1, planned=True)
        cluster.say_go()
        cluster.wait_exits()
        results = cluster.results()
        assert {r.tier for r in cluster.resumed(1)} == {"live"}
        assert min(r.from_step for r in cluster.resumed(1)) >= 4
    calm = undisturbed(zygote, tmp_path / "calm", args, 1)
    assert results[0]["weights"] == pytest.approx(calm[0]["weights"], rel=1e-4, abs=1e-5)


def test_a_planned_world_comes_before_everybody_is_in_its_parent(zygote: Zygote, tmp_path: Path) -> None:
    """One is in the parent already, another hears of both at once and goes to the newer one."""
    with Cluster(zygote, tmp_path, "train", {"steps": 12, "holds": [[0, 4, 2]]}) as cluster:
        cluster.start(3)
        first, late, doomed = cluster.alive
        cluster.wait_said(doomed, holding=4)
        os.kill(late.pid, signal.SIGSTOP)
        cluster.kill(doomed)
        cluster.reform(reason="a node left")
        parent = cluster.generation

        def in_parent() -> bool:
            return any(isinstance(told, wire.Entered) and told.generation == parent for told in first.told)

        cluster.wait(in_parent, "worker in the parent")
        cluster.reform(add=1, planned=True, reason="a node joined")
        os.kill(late.pid, signal.SIGCONT)
        cluster.wait_exits()
        results = cluster.results()
        assert {resumed.tier for resumed in cluster.resumed(cluster.generation)} == {"live"}
    calm = undisturbed(zygote, tmp_path / "calm", {"steps": 12}, 3)
    assert [r["digest"] for r in results] == [r["digest"] for r in calm]


def test_a_death_while_a_planned_world_waits(zygote: Zygote, tmp_path: Path) -> None:
    """The old generation breaks before its ranks agreed to leave it: they enter the new one all the same."""
    args = {"steps": 8, "holds": [[0, 4, 1]]}
    with Cluster(zygote, tmp_path, "train", args) as cluster:
        cluster.start(2)
        doomed = cluster.alive[1]
        cluster.wait_said(doomed, holding=4)
        cluster.reform(add=1, planned=True)
        cluster.kill(doomed)
        cluster.reform(add=1)
        cluster.wait_exits()
        assert len({r["digest"] for r in cluster.results()}) == 1
        assert {(r.tier, r.from_step) for r in cluster.resumed(2)} == {("live", 4)}
