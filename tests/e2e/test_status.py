"""`autoglm status` of real jobs by their store alone, and by their run directory: the same story from both."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from agents import free_port
from etcd_cluster import Cluster, needs_etcd
from job import SCRIPTS, Job

from autoglm_elastic.agent._keys import Keys
from autoglm_elastic.agent.onlooker import reach
from autoglm_elastic.settings import Settings

TRAIN = (str(SCRIPTS / "train.py"), "--pause-s=0.02", "--steps=100000")
WAIT_S = 60.0
Told = dict[str, Any]


class Watching:
    """`autoglm status … --watch --json`: what it has told, and what it still will."""

    def __init__(self, *arguments: str) -> None:
        self.told: list[Told] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "autoglm_elastic.cli.main", "status", *arguments, "--watch", "--json"],
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def wait_for(self, wanted: Callable[[Told], bool]) -> Told:
        deadline, output = time.monotonic() + WAIT_S, self.process.stdout
        assert output is not None
        while True:
            ready = select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]
            line = output.readline() if ready else b""
            assert line, f"not told; the newest: {self.told[-1:]}"
            self.told.append(json.loads(line))
            if wanted(self.told[-1]):
                return self.told[-1]


@contextmanager
def watching(*arguments: str) -> Iterator[Watching]:
    watch = Watching(*arguments)
    try:
        yield watch
    finally:
        watch.process.kill()
        watch.process.wait()
        if watch.process.stdout is not None:
            watch.process.stdout.close()


def autoglm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autoglm_elastic.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.mark.long
def test_a_job_seen_by_its_hosted_store(run_dir: Path) -> None:
    store = f"localhost:{free_port()}"
    flags = (
        "--nnodes=2", "--nproc-per-node=1", "--store", f"tcp://{store}", "--rdzv-id=seen", "--run-dir", run_dir,
        "--set=snapshot.interval_steps=20", *TRAIN,
    )  # fmt: skip
    with Job(*flags) as first, Job(*flags) as second:
        first.wait_for(lambda line: line.get("step", 0) >= 3)
        with watching(store, "--rdzv-id=seen") as watch:
            told = watch.wait_for(
                lambda told: told["state"] == "running" and told["steps_per_s"] and told["snapshot_step"] > 0
            )
            assert (told["world_size"], told["generation"], len(told["nodes"])) == (2, 1, 2)
            assert {rank["state"] for rank in told["ranks"]} == {"running"}
            assert told["newest_by_tier"]["live"] >= told["newest_by_tier"]["disk"] > 0
            assert told["incidents"] == []

            second.kill_worker(second.wait_for(lambda line: "rank" in line)["rank"])
            told = watch.wait_for(lambda told: told["state"] == "running" and told["generation"] == 2)
            (incident,) = told["incidents"]
            assert "SIGKILL" in incident["reason"] or "signal 9" in incident["reason"]
            assert (incident["tier"], incident["generation"]) == ("live", 2)
            assert 0 < incident["seconds"] < WAIT_S

            by_files = json.loads(autoglm("status", str(run_dir), "--json").stdout)
            assert by_files["incidents"][0]["generation"] == 2
            assert by_files["steps_per_s"] > 0
            assert by_files["step"] >= told["step"]

            other = autoglm("status", store, "--rdzv-id=other")
            assert (other.returncode, other.stderr.count("\n")) == (1, 1)
            first.process.send_signal(signal.SIGTERM)
            assert watch.wait_for(lambda told: told["state"] == "paused")["newest_by_tier"]["disk"] > 0
            assert watch.process.wait(WAIT_S) == 0
        assert (first.wait(), second.wait()) == (75, 75)
    gone = autoglm("status", store, "--rdzv-id=seen")
    assert gone.returncode == 1
    assert f"no store at {store}" in gone.stderr


@needs_etcd
@pytest.mark.long
def test_a_job_seen_by_etcd(tmp_path: Path, run_dir: Path) -> None:
    with Cluster(tmp_path / "etcd") as cluster:
        flags = (
            "--nnodes=1:2", "--nproc-per-node=1", "--store", cluster.address, "--rdzv-id=seen",
            "--run-dir", run_dir, *TRAIN,
        )  # fmt: skip
        with Job(*flags) as first:
            first.wait_for(lambda line: line.get("step", 0) >= 3)
            with watching(cluster.address, "--rdzv-id=seen") as watch:
                watch.wait_for(lambda told: told["state"] == "running" and told["steps_per_s"])
                with Job(*flags) as second:
                    told = watch.wait_for(lambda told: told["world_size"] == 2 and told["state"] == "running")
                    assert told["incidents"] == [], "a planned growth is none"
                    second.process.kill()
                    second.process.wait()
                    told = watch.wait_for(lambda told: bool(told["incidents"]) and told["state"] == "running")
                    assert told["incidents"][0]["reason"].endswith("left")
                    assert told["world_size"] == 1
                first.process.send_signal(signal.SIGTERM)
                assert first.wait() == 75
        again = autoglm("status", cluster.address, "--rdzv-id=seen")
        assert again.returncode == 2
        assert "no run 'seen' in this store" in again.stderr
        with closing(reach(cluster.address, "seen", Settings())) as store:
            assert store.get_prefix(Keys("seen").notes)[0] == []
