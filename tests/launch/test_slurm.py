"""launch/slurm on a real Slurm of three nodes: a node dies, time runs out, an operator queues the job again."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import NODES, Slurm, needs_slurm

pytestmark = [pytest.mark.slurm, needs_slurm, pytest.mark.timeout(300)]

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "launch" / "slurm" / "autoglm.sbatch"
TRAIN = REPOSITORY / "tests" / "e2e" / "scripts" / "train.py"
FLAGS = ("--nproc-per-node=1", "--set", "snapshot.interval_steps=10", "--set", "snapshot.interval_s=0")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Submitted:
    """A training of `steps` steps on all nodes."""

    def __init__(self, slurm: Slurm, run_dir: Path, steps: int, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.slurm, self.run_dir = slurm, run_dir
        self.number = slurm.submit(
            f"--nodes={len(NODES)}", *options, SCRIPT, *FLAGS, TRAIN, f"--steps={steps}", "--pause-s=0.05",
            AUTOGLM_RUN_DIR=str(run_dir), AUTOGLM_PORT=str(port),
        )  # fmt: skip

    def reports(self) -> list[dict[str, int]]:
        lines = self.slurm.output(self.number).splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def steps(self, world: int | None = None) -> list[int]:
        return [line["step"] for line in self.reports() if "step" in line and world in (None, line["world"])]

    def wait_for_step(self, step: int, world: int | None = None) -> None:
        self.slurm.until(f"step {step}", lambda: max(self.steps(world), default=0) >= step)

    def newest_snapshot(self) -> int:
        names = [path.name for path in (self.run_dir / "catalog").glob("*.json")]
        return max((int(name.partition("-")[0]) for name in names), default=0)

    def entered(self) -> list[int]:
        """The step from which rank 0 began or went on, each time."""
        return [line["entered"] for line in self.reports() if "entered" in line and line["rank"] == 0]

    def wait_until_done(self) -> None:
        self.slurm.until(
            "it has ended", lambda: self.slurm.state(self.number) not in ("PENDING", "RUNNING", "COMPLETING")
        )
        shown = self.slurm.show(self.number)
        assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), self.slurm.output(self.number)


def test_a_node_dies_and_the_job_goes_on_without_it(slurm: Slurm, run_dir: Path) -> None:
    job = Submitted(slurm, run_dir, 150)
    job.wait_for_step(20, world=3)
    slurm.kill_node("n3")
    job.wait_until_done()
    slurm.start_node("n3")
    slurm.until("all nodes are idle", lambda: slurm.tell("sinfo", "-h", "-o", "%D %t") == "3 idle")
    assert max(job.steps(world=2)) == 150
    assert sorted(set(job.steps())) == list(range(1, 151)), "no step was lost"
    assert slurm.show(job.number)["Restarts"] == "0"


def test_time_runs_out_and_an_operator_queues_it_again(slurm: Slurm, run_dir: Path) -> None:
    """Slurm sends the signal when it sees that fewer seconds than those of `--signal` are left."""
    job = Submitted(slurm, run_dir, 2000, "--time=60", "--signal=B:USR1@100")
    job.wait_for_step(20, world=3)
    hours, minutes, seconds = map(int, slurm.show(job.number)["RunTime"].split(":"))
    limit = math.ceil(hours * 60 + minutes + seconds / 60) + 1
    slurm.tell("scontrol", "update", f"JobId={job.number}", f"TimeLimit={limit}")
    slurm.until("it asks to be queued again", lambda: slurm.state(job.number) != "RUNNING")
    slurm.start_again(job.number, minutes=60)
    left_at = max(job.steps())
    assert job.newest_snapshot() == left_at, "the snapshot of the step at which they left"

    job.wait_for_step(left_at + 20)
    slurm.tell("scontrol", "requeue", str(job.number))
    slurm.start_again(job.number, minutes=60)
    newest = job.newest_snapshot()
    assert newest > left_at
    assert job.entered()[:2] == [0, left_at], "it went on where it had left"

    job.wait_for_step(newest + 5)
    assert job.entered()[2:] == [newest], "it went on from the newest snapshot"
    assert slurm.show(job.number)["Restarts"] == "2"
    slurm.tell("scancel", str(job.number))
    slurm.until("it is cancelled", lambda: slurm.state(job.number) == "CANCELLED")
