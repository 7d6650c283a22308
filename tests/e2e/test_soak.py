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
from agents import agent, free_port, host_first, in_lineage, losses, wait, wait_for
from job import SCRIPTS, Job

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("AUTOGLM_SOAK_KILLS", "60"))
SEED = int(os.environ.get("AUTOGLM_SOAK_SEED", "1"))
STEPS_A_KILL = 4
"""At most, in the world of all agents, between what is done to it."""

LAST_STEPS = 50
PAUSE_S = 0.02
FAULTS = {"worker": 36, "two workers": 8, "agent": 10, "store": 3}
"""What is killed, with its weight."""
BACK_S_MAX = 90.0


class Soak:
    """Two agents of two workers, or what is left of them."""

    def __init__(self, run_dir: Path, end: Path) -> None:
        self.run_dir = run_dir
        self.end = end
        self.port = free_port()
        self.dice = random.Random(SEED)
        self.jobs: list[Job] = []
        self.over: list[Job] = []
        self.story: list[str] = []
        self.step = 0
        self._pids: set[int] = set()
        self._start()
        self._start()

    def _start(self) -> None:
        self.jobs.append(
            agent(
                self.port,
                self.run_dir,
                "--set=snapshot.interval_steps=20",
                SCRIPTS / "endless.py",
                self.end,
                f"--pause-s={PAUSE_S}",
            )
        )

    def _take_in(self) -> None:
        """What has been reported, so that nobody looks through it again."""
        for job in self.jobs:
            self.step = max([self.step, *(line.get("step", 0) for line in job.reports)])
            self._pids |= {line["pid"] for line in job.reports}
            job.reports.clear()

    def run_on(self, steps: int) -> None:
        """Until somebody reports `steps` more, in the world of all agents that are there."""
        for job in self.jobs:
            job.read()
        self._take_in()
        target, world = self.step + steps, 2 * len(self.jobs)
        wait_for(self.jobs, lambda line: line.get("step", 0) >= target and line["world"] == world, BACK_S_MAX)
        self._take_in()

    def stop(self) -> int:
        """The step that the job then ends with."""
        last = self.step + LAST_STEPS
        new = self.end.with_suffix(".new")
        new.write_text(str(last))
        new.rename(self.end)
        assert wait(*self.jobs, timeout_s=BACK_S_MAX) == [0] * len(self.jobs)
        return last

    def kill(self) -> None:
        (kind,) = self.dice.choices(list(FAULTS), weights=list(FAULTS.values()))
        self.story.append(f"step {self.step}, {len(self.jobs)} agents: {kind}")
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
        """Live ones of ours; a worker has reported."""
        agents = {job.process.pid for job in self.jobs}
        self._pids = {pid for pid in self._pids if _is_alive_below(pid, agents)}
        return sorted(self._pids)

    def close(self) -> None:
        for job in [*self.jobs, *self.over]:
            job.__exit__()


def _is_alive_below(pid: int, agents: set[int]) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and any(p.pid in agents for p in process.parents())
    except psutil.NoSuchProcess:
        return False


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


def test_no_series_of_kills_loses_or_repeats_a_step(run_dir: Path, tmp_path: Path) -> None:
    soak = Soak(run_dir, tmp_path / "end")
    try:
        for _ in range(KILLS):
            soak.run_on(soak.dice.randint(1, STEPS_A_KILL))
            soak.kill()
        soak.run_on(1)
        last = soak.stop()
    except BaseException:
        print("\n".join(soak.story))
        raise
    finally:
        soak.close()
    counted = [step for _, step in in_lineage(run_dir)]
    assert counted == list(range(1, last + 1)), "a step is missing, or counts twice"
    assert_live_recoveries_lose_nothing(run_dir)
    assert len({line["weights"] for job in soak.jobs for line in job.reports if "weights" in line}) == 1

    undisturbed = tmp_path / "undisturbed"
    arguments = ("--nproc-per-node=2", "--run-dir", undisturbed, SCRIPTS / "endless.py", soak.end)
    with Job("--standalone", *arguments) as job:
        assert job.wait(600) == 0
    calm, disturbed = losses(undisturbed), losses(run_dir)
    assert len(disturbed) > last - 3 * KILLS
    assert disturbed == {step: pytest.approx(calm[step], rel=1e-3) for step in disturbed}
