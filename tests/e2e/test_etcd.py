"""The main job on a real etcd of three members: nodes and members die, etcd goes and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from etcd_cluster import Cluster, needs_etcd
from job import SCRIPTS, Job

pytestmark = needs_etcd

TRAIN = SCRIPTS / "train.py"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "etcd", members=3) as running:
        yield running


def arguments(cluster: Cluster, *more: object) -> tuple[str, ...]:
    common = ("--nnodes=1:2", "--nproc-per-node=1", "--store", cluster.address, "--rdzv-id=job", *more)
    return tuple(map(str, common))


def keys_left(cluster: Cluster) -> int:
    member = next(index for index, process in enumerate(cluster.processes) if process is not None)
    return int(cluster.ask(member, "kv/range", {"key": "AA==", "range_end": "AA=="}).get("count", 0))


def reported(*jobs: Job) -> list[int]:
    """Steps that anybody reported; one rank may be a step behind another."""
    return sorted({line["step"] for job in jobs for line in job.reports if "step" in line})


def test_a_worker_the_etcd_leader_and_an_agent_die_and_no_step_is_lost(
    cluster: Cluster, run_dir: Path
) -> None:
    command = arguments(cluster, "--run-dir", run_dir, TRAIN, "--pause-s=0.05", "--steps=250")
    with Job(*command) as first, Job(*command) as second:
        first.wait_for(lambda line: line.get("step", 0) >= 5 and line["world"] == 2)
        second.wait_for(lambda line: "pid" in line)
        first.kill_worker(first.reports[0]["rank"])
        step = max(reported(first))
        first.wait_for(lambda line: line.get("step", 0) > step + 5 and line["world"] == 2)
        cluster.kill(cluster.leader())
        step = max(reported(first))
        first.wait_for(lambda line: line.get("step", 0) > step + 60 and line["world"] == 2)
        second.process.kill()
        second.process.wait()
        first.wait_for(lambda line: line.get("world") == 1 and "step" in line)
        with Job(*command) as third:
            first.wait_for(lambda line: line.get("world") == 2 and line.get("step", 0) > step + 60)
            assert first.wait() == 0, first.output()
            assert third.wait() == 0, third.output()
        assert reported(first) == list(range(1, 251))
    assert keys_left(cluster) == 0
