"""The main job on a real etcd of three members: nodes and members die, etcd goes and comes back."""

from __future__ import annotations

import base64
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from agents import assert_each_step_once
from etcd_cluster import Cluster, needs_etcd
from job import SCRIPTS, Job

pytestmark = [needs_etcd, pytest.mark.long]

TRAIN = SCRIPTS / "train.py"
FOR_EVER = "--steps=100000"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "etcd", members=3) as running:
        yield running


def arguments(cluster: Cluster, *more: object) -> tuple[str, ...]:
    common = ("--nnodes=1:2", "--nproc-per-node=1", "--store", cluster.address, "--rdzv-id=job", *more)
    return tuple(map(str, common))


def leave(*jobs: Job) -> int:
    """Ends jobs that would train for ever, with a snapshot; the last step of theirs."""
    jobs[0].process.send_signal(signal.SIGTERM)
    for job in jobs:
        assert job.wait() == 75, job.output()
    return max(reported(*jobs))


def keys_left(cluster: Cluster) -> int:
    member = next(index for index, process in enumerate(cluster.processes) if process is not None)
    return int(cluster.ask(member, "kv/range", {"key": "AA==", "range_end": "AA=="}).get("count", 0))


def reported(*jobs: Job) -> list[int]:
    """Steps that anybody reported; one rank may be a step behind another."""
    return sorted({line["step"] for job in jobs for line in job.reports if "step" in line})


@contextmanager
def two_nodes(cluster: Cluster, run_dir: Path, pause_s: float = 0.05) -> Iterator[tuple[Job, Job]]:
    """They train together, for ever; both have reported."""
    command = arguments(cluster, "--run-dir", run_dir, TRAIN, f"--pause-s={pause_s}", FOR_EVER)
    with Job(*command) as first, Job(*command) as second:
        first.wait_for(lambda line: line.get("step", 0) >= 3 and line["world"] == 2)
        second.wait_for(lambda line: "pid" in line)
        yield first, second


def revoke_lease_of(cluster: Cluster, job: Job) -> None:
    """As a leader of etcd that was stopped does to all nodes when it goes on (etcd#15247)."""
    members = cluster.ask(0, "kv/range", {"key": key("members/"), "range_end": key("members0")})["kvs"]
    (lease,) = (
        member["lease"]
        for member in members
        if f"-{job.process.pid}-" in base64.b64decode(member["key"]).decode()
    )
    cluster.ask(0, "lease/revoke", {"ID": lease})


def key(name: str) -> str:
    return base64.b64encode(f"/autoglm/job/{name}".encode()).decode()


def end_with_every_step_once(cluster: Cluster, run_dir: Path, *jobs: Job) -> None:
    left_at = leave(*jobs)
    assert reported(*jobs) == list(range(1, left_at + 1))
    assert_each_step_once(run_dir)
    assert keys_left(cluster) == 0


def test_a_worker_the_etcd_leader_and_an_agent_die_and_no_step_is_lost(
    cluster: Cluster, run_dir: Path
) -> None:
    command = arguments(cluster, "--run-dir", run_dir, TRAIN, "--pause-s=0.05", FOR_EVER)
    with Job(*command) as first, Job(*command) as second:
        first.wait_for(lambda line: line.get("step", 0) >= 5 and line["world"] == 2)
        second.wait_for(lambda line: "pid" in line)
        first.kill_worker(first.reports[0]["rank"])
        step = max(reported(first))
        first.wait_for(lambda line: line.get("step", 0) > step + 5 and line["world"] == 2)
        cluster.kill(cluster.leader())
        step = max(reported(first))
        first.wait_for(lambda line: line.get("step", 0) > step + 60 and line["world"] == 2)
        first.read()
        step = max(reported(first))
        second.process.kill()
        second.process.wait()
        alone = first.wait_for(lambda line: line.get("world") == 1 and line.get("step", 0) > step)["step"]
        with Job(*command) as third:
            first.wait_for(lambda line: line.get("world") == 2 and line.get("step", 0) > alone)
            left_at = leave(first, third)
        assert reported(first) == list(range(1, left_at + 1))
    assert keys_left(cluster) == 0


def test_a_death_is_told_although_the_member_that_takes_the_report_is_stopped(
    cluster: Cluster, run_dir: Path
) -> None:
    """Both agents use the first endpoint; nobody knows what becomes of what it was asked."""
    with two_nodes(cluster, run_dir) as (first, second):
        cluster.stop(0)
        rank = int(first.reports[0]["rank"])
        first.kill_worker(rank)
        step = max(reported(first, second))
        second.wait_for(lambda line: line.get("step", 0) > step + 5 and line["world"] == 2)
        cluster.cont(0)
        end_with_every_step_once(cluster, run_dir, first, second)
        assert len({line["pid"] for line in second.reports}) == 1, "it kept its state"


@pytest.mark.parametrize(
    ("whose", "pause_s"),
    [("stopped", 0.1), ("other", 0.1), ("both", 0.1), ("stopped", 1.0), ("other", 1.0)],
)
def test_a_lease_that_ends_while_the_job_is_asked_to_stop_costs_nothing(
    cluster: Cluster, run_dir: Path, whose: str, pause_s: float
) -> None:
    """A worker that computes for a second is not out of its generation in time, and is replaced."""
    with two_nodes(cluster, run_dir, pause_s) as (stopped, other):
        stopped.process.send_signal(signal.SIGTERM)
        for name, job in (("stopped", stopped), ("other", other)):
            if whose in (name, "both"):
                revoke_lease_of(cluster, job)
        assert (stopped.wait(), other.wait()) == (75, 75), stopped.output() + other.output()
        left_at = max(reported(stopped, other))
        assert reported(stopped, other) == list(range(1, left_at + 1))
        assert_each_step_once(run_dir)


def test_a_death_while_all_of_etcd_is_lost_is_made_good_when_it_is_back(
    cluster: Cluster, run_dir: Path
) -> None:
    with two_nodes(cluster, run_dir) as (first, second):
        cluster.kill(0, 1, 2)
        first.wait_for_text("running steps go on, membership stands still")
        first.kill_worker(int(first.reports[0]["rank"]))
        first.wait_for_text("will tell it later")
        with pytest.raises(AssertionError, match="was not printed"):
            second.wait_for_text(
                "Connection closed by peer", timeout_s=8.0
            )  # more than it waits for an error's reason
        step = max(reported(first, second))
        cluster.start(0, 1, 2)
        second.wait_for(lambda line: line.get("step", 0) > step + 5 and line["world"] == 2)
        end_with_every_step_once(cluster, run_dir, first, second)
        assert len({line["pid"] for line in second.reports}) == 1, "it kept its state"


def test_all_of_etcd_is_lost_and_comes_back(cluster: Cluster, run_dir: Path) -> None:
    command = arguments(cluster, "--run-dir", run_dir, TRAIN, "--pause-s=0.05", FOR_EVER)
    with Job(*command) as first:
        first.wait_for(lambda line: line.get("step", 0) >= 5)
        cluster.kill(0, 1, 2)
        step = max(reported(first))
        first.wait_for(lambda line: line.get("step", 0) > step + 100)  # five seconds: more than two leases
        cluster.start(0, 1, 2)
        with Job(*command) as second:
            first.wait_for(lambda line: line.get("world") == 2 and "step" in line)
            left_at = leave(first, second)
        assert reported(first) == list(range(1, left_at + 1))
        assert len({line["pid"] for line in first.reports}) == 1, "its worker was never stopped"
    assert keys_left(cluster) == 0


def test_all_of_etcd_falls_silent_and_every_node_keeps_what_its_workers_hold(
    cluster: Cluster, run_dir: Path
) -> None:
    """Nobody can tell then whether the others have gone on, so nobody does; and when it is back nobody has."""
    with two_nodes(cluster, run_dir) as (first, second):
        for member in range(3):
            cluster.stop(member)
        for job in (first, second):
            job.wait_for_text("lost the membership, the workers hold their state")
        step = max(reported(first, second))
        for member in range(3):
            cluster.cont(member)
        first.wait_for(lambda line: line.get("world") == 2 and line.get("step", 0) > step)
        end_with_every_step_once(cluster, run_dir, first, second)
        assert {len({line["pid"] for line in job.reports}) for job in (first, second)} == {1}


def test_etcd_that_does_not_come_back_ends_the_job_with_a_snapshot(cluster: Cluster, run_dir: Path) -> None:
    flags = ("--set", "store.lost_limit_s=2", "--run-dir", run_dir, TRAIN, "--pause-s=0.02", FOR_EVER)
    with Job(*arguments(cluster, *flags)) as first, Job(*arguments(cluster, *flags)) as second:
        first.wait_for(lambda line: line.get("step", 0) >= 5 and line["world"] == 2)
        cluster.kill(0, 1, 2)
        assert first.wait() == 75, first.output()
        assert second.wait() == 75, second.output()
        left_at = max(reported(first))
    assert "the store did not come back for 2 s; do: start the same command again" in first.output()
    cluster.start(0, 1, 2)
    with Job(*arguments(cluster, *flags)) as again:
        again.wait_for(lambda line: "step" in line)
        end = leave(again)
        assert reported(again) == list(range(left_at + 1, end + 1)), "it resumed from the snapshot"
    assert keys_left(cluster) == 0


def test_a_job_whose_agents_were_all_killed_resumes_under_the_same_name(
    cluster: Cluster, run_dir: Path
) -> None:
    flags = ("--set", "snapshot.interval_steps=5", "--run-dir", run_dir, TRAIN, "--pause-s=0.02", FOR_EVER)
    with Job(*arguments(cluster, *flags)) as first:
        first.wait_for(lambda line: line.get("step", 0) >= 12)
        first.process.kill()
        first.process.wait()
    with Job(*arguments(cluster, *flags)) as again:  # the dead agent's lease has not ended yet
        step = again.wait_for(lambda line: "step" in line)["step"]
        assert 5 < step <= max(reported(first)) + 1, "from a snapshot"
        leave(again)
    assert keys_left(cluster) == 0


def test_a_run_id_is_needed_and_endpoints_that_nobody_serves_are_named() -> None:
    with Job("--store=etcd://127.0.0.1:1", TRAIN) as job:
        assert job.wait() == 2
        assert "do: give --rdzv-id" in job.output()
    with Job(
        "--store=etcd://127.0.0.1:1", "--rdzv-id=j", "--set", "membership.join_timeout_s=0.5", TRAIN
    ) as job:
        assert job.wait() == 1
        assert "etcd at 127.0.0.1:1 does not answer" in job.output()
