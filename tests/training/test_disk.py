"""What only the run directory can give back: everybody dead, sharded state, a stop, the next start."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import Cluster, Zygote

from autoglm_elastic import wire

EVERY_2 = {"snapshot": {"interval_steps": 2, "interval_s": 0}}


def test_everybody_dies_and_the_next_start_resumes(zygote: Zygote, tmp_path: Path, run_dir: Path) -> None:
    args = {
        "steps": 12,
        "paced": True,
        "dropout": 0.1,
        "scheduler": True,
        "frozen": True,
        "holds": [[0, 7, 0], [0, 7, 1]],
    }
    with Cluster(zygote, tmp_path, "train", args, run_dir=run_dir, settings=EVERY_2) as cluster:
        cluster.start(2)
        for worker in cluster.alive:
            cluster.wait_said(worker, holding=7)
        cluster.wait(
            lambda: any(e["step"] == 6 for e in cluster.events("snapshot.committed")), "snapshot of step 6"
        )
    with Cluster(
        zygote, tmp_path, "train", args, run_dir=run_dir, settings=EVERY_2, first_generation=1
    ) as cluster:
        cluster.start(2)
        cluster.wait_exits()
        resumed = cluster.results()
        assert {(r.tier, r.from_step) for r in cluster.resumed(1)} == {("disk", 6)}
    (tmp_path / "calm").mkdir()
    with Cluster(zygote, tmp_path / "calm", "train", args | {"holds": None}) as cluster:
        cluster.start(2)
        cluster.wait_exits()
        calm = cluster.results()
    assert [r["digest"] for r in resumed] == [r["digest"] for r in calm]
    assert [r["lr"] for r in resumed] == [r["lr"] for r in calm]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["generation"] == 1] == list(range(7, 13))


def test_sharded_state_four_three_two_four(zygote: Zygote, tmp_path: Path, run_dir: Path) -> None:
    """FSDP2: a loss goes back to the newest snapshot; a planned world moves the live shards."""
    args: dict[str, Any] = {"steps": 14, "paced": True, "shard": True, "frozen": True, "batch": 12}
    disturbed = args | {"holds": [[0, 5, 3], [1, 7, 2], [2, 9, -1]]}
    with Cluster(zygote, tmp_path, "train", disturbed, run_dir=run_dir, settings=EVERY_2) as cluster:
        cluster.start(4)
        for held_at, snapshot in ((5, 4), (7, 6)):
            doomed = cluster.alive[-1]
            cluster.wait_said(doomed, holding=held_at)
            cluster.wait(
                lambda step=snapshot: any(e["step"] == step for e in cluster.events("snapshot.committed")),
                "snapshot",
            )
            cluster.kill(doomed)
            cluster.reform()
        cluster.wait_said(cluster.alive[0], waiting=9)
        cluster.reform(add=2, planned=True)
        cluster.say_go()
        cluster.wait_exits()
        results = cluster.results()
        assert {(r.tier, r.from_step) for r in cluster.resumed(1)} == {("disk", 4)}
        assert {(r.tier, r.from_step) for r in cluster.resumed(2)} == {("disk", 6)}
        assert {r.tier for r in cluster.resumed(3)} == {"live"}
        assert min(r.from_step for r in cluster.resumed(3)) >= 9
    assert len({r["digest"] for r in results}) == 1
    (tmp_path / "calm").mkdir()
    with Cluster(zygote, tmp_path / "calm", "train", args) as cluster:
        cluster.start(1)
        cluster.wait_exits()
        calm = cluster.results()
    assert results[0]["weights"] == pytest.approx(calm[0]["weights"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("how", ["message", "signal"])
def test_a_stop_is_agreed_and_leaves_a_snapshot(
    zygote: Zygote, tmp_path: Path, run_dir: Path, how: str
) -> None:
    args = {"steps": 100_000}
    with Cluster(zygote, tmp_path, "train", args, run_dir=run_dir) as cluster:
        cluster.start(2)
        cluster.wait_said(cluster.alive[1], committed=2)
        if how == "message":
            cluster.send(cluster.alive[1], wire.Stop(signal=int(signal.SIGUSR1), deadline_s=30.0))
        else:
            os.kill(cluster.alive[1].pid, signal.SIGTERM)
        cluster.wait_exits(code=75)
        done = [m for w in cluster.alive for m in w.told if isinstance(m, wire.Done)]
        assert [d.requeue for d in done] == [True, True]
        assert len({d.step for d in done}) == 1
        committed = [e["step"] for e in cluster.events("snapshot.committed")]
        assert committed == [done[0].step]


def test_a_stop_between_two_worlds_is_agreed_in_the_next(
    zygote: Zygote, tmp_path: Path, run_dir: Path
) -> None:
    """Preemption often comes with deaths: what the survivor holds must not be lost for it."""
    args = {"steps": 100_000}
    with Cluster(zygote, tmp_path, "train", args, run_dir=run_dir) as cluster:
        cluster.start(2)
        survivor, other = cluster.alive
        cluster.wait_said(survivor, committed=2)
        cluster.kill(other)
        cluster.wait(lambda: wire.Unwound(0) in survivor.told, "unwinding")
        cluster.send(survivor, wire.Stop(signal=int(signal.SIGTERM), deadline_s=30.0))
        cluster.reform(add=1)
        cluster.wait_exits(code=75)
        done = [m for w in cluster.alive for m in w.told if isinstance(m, wire.Done)]
        assert [d.requeue for d in done] == [True, True]
        assert done[0].step > 2
        assert [e["step"] for e in cluster.events("snapshot.committed")] == [done[0].step]


def test_a_death_during_the_snapshot_of_a_stop(zygote: Zygote, tmp_path: Path, run_dir: Path) -> None:
    """All had agreed to leave, nothing was durable: the others enter once more, and stop there."""
    args = {"steps": 100_000, "held": "for good"}
    with Cluster(zygote, tmp_path, "train", args, run_dir=run_dir) as cluster:
        cluster.start(3)
        first, doomed, last = cluster.alive
        cluster.wait_said(first, committed=2)
        cluster.send(first, wire.Stop(signal=int(signal.SIGTERM), deadline_s=30.0))
        for worker in (first, last):
            cluster.wait(lambda w=worker: any("leaving" in said for said in w.said), "wait for the snapshot")
        cluster.wait_said(first, in_flight=True)
        cluster.kill(doomed)
        cluster.reform(add=1)
        cluster.wait_exits(code=75)
        done = [m for w in cluster.alive for m in w.told if isinstance(m, wire.Done)]
        assert [d.requeue for d in done] == [True] * 3
        assert {d.step for d in done} == {done[0].step}
        committed = [(e["step"], e["generation"]) for e in cluster.events("snapshot.committed")]
        assert committed == [(done[0].step, 1)]


def test_a_stop_without_a_world_to_come_ends_in_time(zygote: Zygote, tmp_path: Path, run_dir: Path) -> None:
    args = {"steps": 100_000}
    with Cluster(zygote, tmp_path, "train", args, run_dir=run_dir) as cluster:
        cluster.start(2)
        survivor, other = cluster.alive
        cluster.wait_said(survivor, committed=2)
        cluster.kill(other)
        cluster.wait(lambda: wire.Unwound(0) in survivor.told, "unwinding")
        cluster.send(survivor, wire.Stop(signal=int(signal.SIGTERM), deadline_s=0.1))
        cluster.wait_exits(code=128 + signal.SIGTERM)


def test_a_snapshot_can_be_asked_for(zygote: Zygote, tmp_path: Path, run_dir: Path) -> None:
    args = {"steps": 8, "paced": True, "ask_at": 3}
    with Cluster(zygote, tmp_path, "train", args, run_dir=run_dir) as cluster:
        cluster.start(2)
        cluster.wait_exits()
        assert [e["step"] for e in cluster.events("snapshot.committed")] == [4, 8]


def test_a_planned_world_waits_for_the_snapshot_in_flight(
    zygote: Zygote, tmp_path: Path, run_dir: Path
) -> None:
    args = {"steps": 12, "ask_at": 3, "holds": [[0, 5, -1]], "held": "until a leave"}
    with Cluster(zygote, tmp_path, "train", args, run_dir=run_dir) as cluster:
        cluster.start(2)
        cluster.wait_said(cluster.alive[0], in_flight=True)
        cluster.wait_said(cluster.alive[0], waiting=5)
        cluster.reform(add=1, planned=True)
        cluster.say_go()
        cluster.wait_exits()
        committed = [(e["step"], e["generation"]) for e in cluster.events("snapshot.committed")]
        assert committed == [(4, 0), (12, 1)]
        assert cluster.events("snapshot.aborted") == []


def test_a_death_waits_for_no_snapshot(zygote: Zygote, tmp_path: Path, run_dir: Path) -> None:
    """Also when it comes while a planned world waits for one. What was given up is taken at the next boundary."""
    args = {"steps": 12, "ask_at": 3, "holds": [[0, 5, -1]], "held": "for good"}
    with Cluster(zygote, tmp_path, "train", args, run_dir=run_dir) as cluster:
        cluster.start(3)
        cluster.wait_said(cluster.alive[0], in_flight=True)
        cluster.wait_said(cluster.alive[0], waiting=5)
        cluster.reform(add=1, planned=True)
        cluster.say_go()
        for worker in cluster.alive[:3]:
            cluster.wait(lambda w=worker: any("leaving" in s for s in w.said), "leave")
        cluster.kill(cluster.alive[2])
        cluster.reform(add=1)
        cluster.wait_exits()
        left = next(said["leaving"] for said in cluster.alive[0].said if "leaving" in said)
        assert [e["step"] for e in cluster.events("snapshot.committed")] == [left + 1, 12]
        assert len({r["digest"] for r in cluster.results()}) == 1


def test_a_death_during_the_last_snapshot(zygote: Zygote, tmp_path: Path, run_dir: Path) -> None:
    """All had returned, nothing was durable: the others enter once more, and end with a snapshot."""
    args = {"steps": 4, "held": "for good"}
    with Cluster(zygote, tmp_path, "train", args, run_dir=run_dir) as cluster:
        cluster.start(3)
        cluster.wait_said(cluster.alive[0], leaving=4)
        cluster.wait_said(cluster.alive[0], in_flight=True)
        cluster.kill(cluster.alive[1])
        cluster.reform(add=1)
        cluster.wait_exits()
        results = cluster.results()
        assert [(e["step"], e["generation"]) for e in cluster.events("snapshot.committed")] == [(4, 1)]
    assert [(r["step"], r["entered"]) for r in results] == [(4, 2), (4, 2), (4, 1)]
    assert len({r["digest"] for r in results}) == 1


def mean_losses(cluster: Cluster) -> dict[int, float]:
    """Step → what the metrics should say: the mean over the samples of the newest generation's batch."""
    parts: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for worker in cluster.all:
        for said in worker.said:
            if "loss" in said:
                key = (said["trying"], said["generation"])
                parts.setdefault(key, []).append((said["loss"], len(said["indices"])))
    newest = dict(sorted(parts))
    return {
        step: sum(loss * n for loss, n in parts[step, g]) / sum(n for _, n in parts[step, g])
        for step, g in newest.items()
    }


@pytest.mark.parametrize("extra", [{}, {"shard": True}], ids=["replicate", "shard"])
def test_the_loss_in_the_metrics_is_that_of_the_global_batch(
    zygote: Zygote, tmp_path: Path, run_dir: Path, extra: dict[str, Any]
) -> None:
    """Also that of the steps around a planned world and of the last one."""
    args = {"steps": 9, "batch": 7, "size": 24, "holds": [[0, 4, -1]]} | extra
    with Cluster(zygote, tmp_path, "train", args, run_dir=run_dir) as cluster:
        cluster.start(2)
        cluster.wait_said(cluster.alive[0], waiting=4)
        cluster.reform(add=1, planned=True)
        cluster.say_go()
        cluster.wait_exits()
        expected = mean_losses(cluster)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["loss"] for row in rows] == pytest.approx([expected[step] for step in range(1, 10)], rel=1e-5)
    assert rows[0]["values"] == {"rank": 0.0}


def test_metrics_lose_no_step_when_rank_0_dies(zygote: Zygote, tmp_path: Path, run_dir: Path) -> None:
    """The loss of the step before is then the mean over those who are left."""
    args = {"steps": 8, "die": {"rank": 0, "step": 4}}
    with Cluster(zygote, tmp_path, "train", args, run_dir=run_dir) as cluster:
        cluster.start(2)
        survivor = cluster.alive[1]
        cluster.wait_said(cluster.alive[0], dying=4)
        cluster.kill(cluster.alive[0])
        cluster.reform(add=1)
        cluster.wait_exits()
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [(row["step"], row["generation"]) for row in rows] == [
            (step, int(step > 4)) for step in range(1, 9)
        ]
        alone = next(s["loss"] for s in survivor.said if s.get("trying") == 4)
        assert rows[3]["loss"] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("gan", [True, False], ids=["two optimizers", "a collective before commit"])
def test_a_half_made_step_is_never_taken_for_a_state(
    zygote: Zygote, tmp_path: Path, run_dir: Path, gan: bool
) -> None:
    """Every survivor is torn at the same place: it says so, and the newest snapshot is resumed from."""
    args = {"steps": 8, "gan": gan}
    settings = {"snapshot": {"interval_steps": 4, "interval_s": 0}}
    with Cluster(zygote, tmp_path, "torn", args | {"lost": 1}, run_dir=run_dir, settings=settings) as cluster:
        cluster.start(3)
        cluster.wait_said(cluster.alive[1], holding=5)
        cluster.wait(lambda: bool(cluster.events("snapshot.committed")), "snapshot of step 4")
        cluster.kill(cluster.alive[1])
        cluster.reform(add=1)
        cluster.wait_exits()
        assert {(r.tier, r.from_step) for r in cluster.resumed(1)} == {("disk", 4)}
        told = cluster.events("state.torn")
        assert [(e["generation"], e["step"]) for e in told] == [(0, 5)] * 2
        expected = "'first' had stepped, 'second' had not" if gan else "an error came before job.commit"
        assert all(expected in e["reason"] for e in told)
        disturbed = {r["digest"] for r in cluster.results()}
    (tmp_path / "calm").mkdir()
    with Cluster(zygote, tmp_path / "calm", "torn", args) as cluster:
        cluster.start(3)
        cluster.wait_exits()
        assert {r["digest"] for r in cluster.results()} == disturbed
