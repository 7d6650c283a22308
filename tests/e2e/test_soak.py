"""A job that is killed again and again: workers, pairs of workers, agents, the agent that hosts the store.

tests/run -m campaign tests/e2e/test_soak.py        (AUTOGLM_SOAK_KILLS=300 AUTOGLM_SOAK_SEED=7 for another one)
"""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import psutil
import pytest
from agents import agent, free_port, host_first, in_lineage, wait, wait_for
from job import SCRIPTS, Job

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("AUTOGLM_SOAK_KILLS", "60"))
SEED = int(os.environ.get("AUTOGLM_SOAK_SEED", "1"))
STEPS_A_KILL = 8
STEPS = KILLS * STEPS_A_KILL + 40
FAULTS = {"worker": 36, "two workers": 8, "agent": 10, "store": 3}
"""What is killed, with its weight."""
BACK_S_MAX = 90.0


class Soak:
    """Two agents of two workers, or what is left of them."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.port = free_port()
        self.dice = random.Random(SEED)
        self.jobs: list[Job] = []
        self.over: list[Job] = []
        self.story: list[str] = []
        self._start()
        self._start()

    def _start(self) -> None:
        self.jobs.append(
            agent(
                self.port,
                self.run_dir,
                "--set=snapshot.interval_steps=20",
                SCRIPTS / "train.py",
                f"--steps={STEPS}",
                "--pause-s=0.01",
            )
        )

    def step(self) -> int:
        return max(
            (line.get("step", 0) for job in [*self.jobs, *self.over] for line in job.reports), default=0
        )

    def run_on(self, steps: int) -> None:
        """Until somebody reports `steps` more, in the world of all agents that are there."""
        target, world = self.step() + steps, 2 * len(self.jobs)
        seen = {id(job): len(job.reports) for job in self.jobs}
        wait_for(
            self.jobs,
            lambda line: (
                line.get("step", 0) >= min(target, STEPS)
                and line["world"] == world
                and any(line in job.reports[seen[id(job)] :] for job in self.jobs)
            ),
            BACK_S_MAX,
        )

    def kill(self) -> None:
        (kind,) = self.dice.choices(list(FAULTS), weights=list(FAULTS.values()))
        self.story.append(f"step {self.step()}, {len(self.jobs)} agents: {kind}")
        if kind in ("worker", "two workers"):
            for pid in self.dice.sample(self._workers(), 1 if kind == "worker" else 2):
                os.kill(pid, signal.SIGKILL)
            return
        host, *others = host_first(self.run_dir, *self.jobs)
        if kind == "agent" and others:
            self._lose(others[0])
            if self.dice.random() < 0.5:
                self.run_on(2)  # the smaller world
        else:
            self._lose(host)
            for other in others:
                assert other.wait(BACK_S_MAX) != 0
                self.jobs.remove(other)
                self.over.append(other)
            self._start()
        if len(self.jobs) < 2:
            self._start()

    def _lose(self, job: Job) -> None:
        job.process.kill()
        job.wait(BACK_S_MAX)
        self.jobs.remove(job)
        self.over.append(job)

    def _workers(self) -> list[int]:
        """Live ones; a worker has reported."""
        pids = {line["pid"] for job in self.jobs for line in job.reports}
        return sorted(
            pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"
        )

    def close(self) -> None:
        for job in [*self.jobs, *self.over]:
            job.__exit__()


def assert_live_recoveries_lose_nothing(run_dir: Path) -> None:
    """Whoever died, the job went on from a step that is no older; until a state had to come from disk."""
    newest = -1
    for line in map(json.loads, (run_dir / "events.jsonl").read_text().splitlines()):
        fields = line["fields"]
        if line["name"] == "worker.died":
            newest = max(newest, fields["step"])
        elif line["name"] == "incident.closed":
            if fields["tier"] == "disk":
                return
            assert fields["tier"] == "fresh" or fields["from_step"] >= newest, fields


def final_loss(run_dir: Path) -> float:
    line = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == STEPS
    return float(line["loss"])


def test_no_series_of_kills_loses_or_repeats_a_step(run_dir: Path, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    with Job(
        "--standalone",
        "--nproc-per-node=2",
        "--run-dir",
        undisturbed,
        SCRIPTS / "train.py",
        f"--steps={STEPS}",
    ) as job:
        assert job.wait(600) == 0
    soak = Soak(run_dir)
    try:
        for _ in range(KILLS):
            soak.run_on(soak.dice.randint(1, STEPS_A_KILL // 2))
            soak.kill()
        assert wait(*soak.jobs, timeout_s=600) == [0] * len(soak.jobs)
    except BaseException:
        print("\n".join(soak.story))
        raise
    finally:
        soak.close()
    counted = [step for _, step in in_lineage(run_dir)]
    assert counted == sorted(set(counted)), "a step counts twice"
    assert_live_recoveries_lose_nothing(run_dir)
    assert final_loss(run_dir) == pytest.approx(final_loss(undisturbed), rel=1e-3)
    digests = {line["digest"] for job in soak.jobs for line in job.reports if "digest" in line}
    assert len(digests) == 1
