"""What users do: without a launcher, under torchrun, with errors of their own, with all kinds of state."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Cluster, Zygote


def test_importing_the_package_does_not_import_torch() -> None:
    program = (
        "import sys, autoglm_elastic as e; print('torch' in sys.modules, sorted(e.__all__) == dir(e) or True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"


@pytest.mark.parametrize("workers", [0, 2], ids=["bare", "torchrun"])
def test_without_our_launcher(zygote: Zygote, tmp_path: Path, run_dir: Path, workers: int) -> None:
    settings = {"snapshot": {"interval_steps": 3, "interval_s": 0}}
    args = {"steps": 7, "paced": True}
    digests = []
    for steps in (7, 10):
        with Cluster(
            zygote,
            tmp_path,
            "train",
            args | {"steps": steps},
            run_dir=run_dir,
            settings=settings,
            launcher=False,
        ) as cluster:
            cluster.start_as_torchrun(workers)
            cluster.wait_exits()
            digests.append({r["digest"] for r in cluster.results()})
            first = [s["step"] for w in cluster.alive for s in w.said if "entered" in s]
            assert set(first) == {0 if steps == 7 else 7}
    assert [len(d) for d in digests] == [1, 1]


@pytest.mark.parametrize("value", ["vector", "text", "complex"])
def test_what_is_no_number_is_refused_in_one_line(zygote: Zygote, tmp_path: Path, value: str) -> None:
    with Cluster(zygote, tmp_path, "commits", {"value": value}, launcher=False) as cluster:
        cluster.start_as_torchrun(0)
        cluster.wait_exits(code=1)
        assert "job.commit(loss=…)" in cluster.logs().splitlines()[-1]


def test_without_a_launcher_each_call_is_a_training_of_its_own(zygote: Zygote, tmp_path: Path) -> None:
    with Cluster(zygote, tmp_path, "commits", {"value": "number", "calls": 2}, launcher=False) as cluster:
        cluster.start_as_torchrun(0)
        cluster.wait_exits()
        assert [s["steps"] for s in cluster.alive[0].said] == [1, 1]


def test_under_a_launcher_a_second_call_is_refused(zygote: Zygote, tmp_path: Path) -> None:
    with Cluster(zygote, tmp_path, "commits", {"value": "number", "calls": 2}) as cluster:
        cluster.start(1)
        cluster.wait_exits(code=1)
        assert [s["steps"] for s in cluster.alive[0].said] == [1]
        last = cluster.logs().splitlines()[-1]
        assert "elastic.run was called again" in last
        assert "put what comes after it into the same function" in last


def test_an_error_of_one_rank_frees_the_others(zygote: Zygote, tmp_path: Path) -> None:
    """They wait in a collective for a rank that will not come, and are not taken for the cause."""
    with Cluster(zygote, tmp_path, "failing", {"step": 2, "rank": 1}) as cluster:
        cluster.start(3)
        failed = cluster.alive[1]
        cluster.wait(lambda: failed.pid in zygote.exits, "end of the rank with the error")
        assert zygote.exits[failed.pid] == 1
        assert "the user's own" in failed.log.read_text()
        cluster.dead(failed)
        cluster.reform(add=1)
        cluster.wait_exits()
        assert {(r.tier, r.from_step) for r in cluster.resumed(1)} == {("live", 2)}


def test_an_error_of_the_users_own_ends_the_worker(zygote: Zygote, tmp_path: Path) -> None:
    with Cluster(zygote, tmp_path, "failing", {"step": 2}) as cluster:
        cluster.start(2)
        cluster.wait_exits(code=1)
        assert "the user's own" in cluster.logs()


def test_a_swallowed_failure_cannot_be_committed(zygote: Zygote, tmp_path: Path) -> None:
    args = {"steps": 8, "swallow": True, "die": {"rank": 1, "step": 4}}
    with Cluster(zygote, tmp_path, "train", args) as cluster:
        cluster.start(2)
        cluster.wait_said(cluster.alive[1], dying=4)
        cluster.kill(cluster.alive[1])
        cluster.reform(add=1)
        cluster.wait_exits()
        assert len({r["digest"] for r in cluster.results()}) == 1
        assert {r.from_step for r in cluster.resumed(1)} == {4}


def test_a_rank_that_is_a_step_behind_catches_up(zygote: Zygote, tmp_path: Path) -> None:
    with Cluster(zygote, tmp_path, "lagging", {"steps": 7}) as cluster:
        cluster.start(3)
        ahead, behind, doomed = cluster.alive
        cluster.wait_said(behind, between=3)
        cluster.wait_said(ahead, committed=4)
        cluster.wait_said(doomed, holding=4)
        behind.report.send(b"go")
        cluster.kill(doomed)
        cluster.reform(add=1)
        cluster.wait_exits()
        results = cluster.results()
        assert len({r["digest"] for r in results}) == 1
        assert {(r.tier, r.from_step) for r in cluster.resumed(1)} == {("live", 4)}
        assert [r["entered"] for r in results] == [2, 2, 1]


@pytest.mark.parametrize("job", ["many_kinds", "only_replicated"])
def test_state_of_many_kinds(zygote: Zygote, tmp_path: Path, job: str) -> None:
    with Cluster(zygote, tmp_path, job, {"steps": 9}) as cluster:
        cluster.start(2)
        held_at = 6 if job == "many_kinds" else 3
        cluster.wait_said(cluster.alive[1], holding=held_at)
        cluster.kill(cluster.alive[1])
        cluster.reform(add=1)
        cluster.wait_exits()
        results = cluster.results()
        assert {r.tier for r in cluster.resumed(1)} == {"live"}
        if job == "many_kinds":
            entered = [s["lr"] for w in cluster.alive for s in w.said if "entered" in s and s["step"] == 6]
            assert entered == pytest.approx([0.025, 0.025])
            assert {r["lr"] for r in results} == {0.025}
    assert len({r["digest"] for r in results}) == 1


@pytest.mark.parametrize("weights", [[3, 2], [1, 1, 0]], ids=["uneven", "empty"])
def test_gradients_are_those_of_the_global_mean(zygote: Zygote, tmp_path: Path, weights: list[int]) -> None:
    with Cluster(zygote, tmp_path, "reduces", {"weights": weights}) as cluster:
        cluster.start(len(weights))
        cluster.wait_exits()
        results = cluster.results()
    assert [r["local"] for r in results] == weights
    assert max(r["worst"] for r in results) < 1e-6


def test_a_worker_whose_agent_is_gone_ends(zygote: Zygote, tmp_path: Path) -> None:
    with Cluster(zygote, tmp_path, "train", {"steps": 100_000}) as cluster:
        cluster.start(1)
        cluster.wait_said(cluster.alive[0], committed=1)
        cluster.alive[0].control.shutdown(socket.SHUT_RDWR)
        cluster.wait(lambda: cluster.alive[0].pid in zygote.exits, "end of the orphan")
