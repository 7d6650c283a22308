"""The main job as a user meets it: `autoglm-run` trains, loses workers and agents, goes on, and ends as if nothing
had happened. Real processes, real kills."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import psutil
import pytest
from job import SCRIPTS, Job

TRAIN = SCRIPTS / "train.py"
PLAIN = SCRIPTS / "plain.py"


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, object]:
    """The end of an undisturbed run on two workers."""
    with Job("--standalone", "--nproc-per-node=2", TRAIN) as job:
        assert job.wait() == 0, job.output()
        return job.wait_for(lambda line: "digest" in line)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def events(run_dir: Path, name: str) -> list[dict[str, object]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [record["fields"] for record in map(json.loads, lines) if record["name"] == name]


def test_a_killed_worker_costs_no_step_and_leaves_no_trace(
    undisturbed: dict[str, object], run_dir: Path
) -> None:
    with Job("--standalone", "--nproc-per-node=2", "--run-dir", run_dir, TRAIN, "--pause-s=0.02") as job:
        job.wait_for(lambda line: line.get("step") == 10)
        survivor = job.wait_for(lambda line: line.get("rank") == 0)["pid"]
        job.kill_worker(1)
        job.wait_for(lambda line: line.get("step") == 20)
        job.kill_worker(1)
        assert job.wait() == 0, job.output()
        end = job.wait_for(lambda line: "digest" in line)
    assert end["digest"] == undisturbed["digest"]
    assert {line["pid"] for line in job.reports if line.get("rank") == 0} == {survivor}, (
        "the survivor kept its process"
    )
    assert job.steps() == list(range(1, 41)), "no step was lost or redone"
    assert [closed["tier"] for closed in events(run_dir, "incident.closed")] == ["fresh", "live", "live"]
    assert len(events(run_dir, "worker.died")) == 2


@pytest.mark.long
def test_rank_zero_may_die_too(undisturbed: dict[str, object]) -> None:
    with Job("--standalone", "--nproc-per-node=2", TRAIN, "--pause-s=0.02") as job:
        job.wait_for(lambda line: line.get("step") == 10)
        job.kill_worker(0)
        assert job.wait() == 0, job.output()
        assert job.wait_for(lambda line: "digest" in line)["digest"] == undisturbed["digest"]


@pytest.mark.long
def test_a_stop_in_the_moment_of_a_death_leaves_a_snapshot(run_dir: Path) -> None:
    """A machine that is taken away often kills before it has finished asking."""
    command = ("--standalone", "--nproc-per-node=2", "--run-dir", run_dir, TRAIN, "--steps=100000")
    with Job(*command, "--pause-s=0.02") as job:
        job.wait_for(lambda line: line.get("step") == 10)
        job.kill_worker(1)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
    assert [closed["tier"] for closed in events(run_dir, "incident.closed")][1:] == ["live"]
    newest = max(event["step"] for event in events(run_dir, "snapshot.committed"))
    assert newest == max(job.steps())


@pytest.mark.long
def test_a_whole_agent_dies_and_comes_back(run_dir: Path) -> None:
    port = free_port()
    common = (
        "--nnodes=1:2", "--nproc-per-node=2", "--rdzv-backend=autoglm", f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-id=agents", "--run-dir", run_dir, TRAIN, "--pause-s=0.05", "--steps=5000",
    )  # fmt: skip
    with Job(*common) as one, Job(*common) as other:
        one.wait_for(lambda line: line.get("step", 0) >= 10 and line["world"] == 4)
        host = next(started["pid"] for started in events(run_dir, "job.started") if started["hosts_store"])
        first, second = (one, other) if one.process.pid == host else (other, one)
        second.process.kill()
        second.process.wait()
        shrunk = first.wait_for(lambda line: line.get("world") == 2 and "step" in line)["step"]
        with Job(*common) as third:
            first.wait_for(lambda line: line.get("world") == 4 and line.get("step", 0) > shrunk)
            first.process.send_signal(signal.SIGTERM)
            assert first.wait() == 75, first.output()
            assert third.wait() == 75, third.output()
    ranks = [line["step"] for line in first.reports if "step" in line]  # any rank: one may be a step behind
    assert sorted(set(ranks)) == list(range(min(ranks), max(ranks) + 1)), "no step was lost"
    tiers = [closed["tier"] for closed in events(run_dir, "incident.closed")]
    assert set(tiers[1:]) == {"live"}, tiers


@pytest.mark.long
def test_a_survivor_that_does_not_unwind_is_replaced(undisturbed: dict[str, object], tmp_path: Path) -> None:
    arguments = ("--stuck-rank=0", "--stuck-step=12", f"--once={tmp_path / 'once'}")
    with Job(
        "--standalone", "--nproc-per-node=2", "--set", "recovery.unwind_limit_s=1", TRAIN, *arguments
    ) as job:
        job.wait_for(lambda line: "stuck" in line)
        job.kill_worker(1)
        assert job.wait() == 0, job.output()
    # Nobody's state survived and there is no run directory: it started over, and says so.
    assert job.wait_for(lambda line: "digest" in line)["digest"] == undisturbed["digest"]


@pytest.mark.long
def test_connections_that_are_reset_between_healthy_workers_cost_no_step_and_no_process(
    undisturbed: dict[str, object], tmp_path: Path, run_dir: Path
) -> None:
    reset = ("--reset-step=12", "--once", tmp_path / "once")
    with Job("--standalone", "--nproc-per-node=2", "--run-dir", run_dir, TRAIN, *reset) as job:
        assert job.wait() == 0, job.output()
        end = job.wait_for(lambda line: "digest" in line)
    assert end["digest"] == undisturbed["digest"]
    assert len({line["pid"] for line in job.reports if "rank" in line}) == 2
    (opened,) = events(run_dir, "incident.opened")
    assert "lost a peer" in str(opened["reason"])
    assert events(run_dir, "worker.died") == []


@pytest.mark.long
def test_exiting_early_is_a_failure_and_is_replaced(undisturbed: dict[str, object], tmp_path: Path) -> None:
    arguments = ("--exit-rank=1", "--exit-step=9", f"--once={tmp_path / 'once'}")
    with Job("--standalone", "--nproc-per-node=2", TRAIN, *arguments) as job:
        assert job.wait() == 0, job.output()
    assert job.wait_for(lambda line: "digest" in line)["digest"] == undisturbed["digest"]


def test_a_users_own_error_ends_the_job_after_its_budget_and_is_named() -> None:
    with Job(
        "--standalone", "--nproc-per-node=2", "--set", "restart.max_failures=2", TRAIN, "--raise-step=5"
    ) as job:
        assert job.wait() == 1
    verdicts = [line for line in job.text if "failures without a new committed step" in line]
    assert len(verdicts) == 1
    assert "the user's own mistake" in verdicts[0]
    assert len([line for line in job.reports if line.get("rank") == 0 and "entered" in line]) == 3


def test_sigterm_commits_a_snapshot_and_the_same_command_resumes(
    undisturbed: dict[str, object], run_dir: Path
) -> None:
    command = ("--standalone", "--nproc-per-node=2", "--run-dir", run_dir, TRAIN)
    with Job(*command, "--pause-s=0.05") as job:
        job.wait_for(lambda line: line.get("step") == 10)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
        left_at = max(job.steps())
    assert (run_dir / "latest").exists()
    with Job(*command) as job:
        assert job.wait() == 0, job.output()
    assert job.steps() == list(range(left_at + 1, 41))
    assert job.wait_for(lambda line: "digest" in line)["digest"] == undisturbed["digest"]


@pytest.mark.long
def test_a_signal_to_every_process_of_the_job_commits_a_snapshot(run_dir: Path) -> None:
    """As Slurm signals a step: not only the agent and the workers get it, but also the zygote and the keeper."""
    command = ("--standalone", "--nproc-per-node=2", "--run-dir", run_dir, TRAIN)
    with Job(*command, "--steps=100000", "--pause-s=0.05", "--snapshot-every=5") as job:
        job.wait_for(lambda line: line.get("step") == 10)
        agent = psutil.Process(job.process.pid)
        keepers = [process for process in psutil.process_iter() if is_keeper_of(process, run_dir)]
        everybody = [agent, *agent.children(recursive=True), *keepers]
        assert len(keepers) == 1
        assert len(everybody) == 5, "agent, zygote, two workers, keeper"
        for process in everybody:
            process.send_signal(signal.SIGUSR1)
        assert job.wait() == 75, job.output()
        assert len(job.steps()) < 100000
    newest = max(int(path.name.partition("-")[0]) for path in (run_dir / "catalog").glob("*.json"))
    assert newest == max(job.steps())


def is_keeper_of(process: psutil.Process, run_dir: Path) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return "autoglm_elastic.keeper" in words and any(str(run_dir) in word for word in words)


@pytest.mark.parametrize(
    "shard", [False, pytest.param(True, marks=pytest.mark.long)], ids=["replicated", "fsdp2"]
)
def test_losing_everybody_falls_back_to_the_newest_snapshot(shard: bool, run_dir: Path) -> None:
    flags = ("--shard",) if shard else ()
    command = (
        "--standalone",
        "--nproc-per-node=2",
        "--run-dir",
        run_dir,
        "--set",
        "snapshot.interval_steps=5",
        TRAIN,
        "--pause-s=0.03",
        *flags,
    )
    with Job(*command) as job:
        job.wait_for(lambda line: line.get("step") == 17)
        job.kill_worker(0)
        job.kill_worker(1)
        assert job.wait() == 0, job.output()
    closed = events(run_dir, "incident.closed")[-1]
    assert closed["tier"] == "disk"
    assert int(str(closed["from_step"])) >= 5
    assert job.steps()[-1] == 40


def test_a_plain_script_restarts_as_under_torchrun() -> None:
    with Job("--standalone", "--nproc-per-node=2", "--max-restarts=3", PLAIN, "10", "2") as job:
        assert job.wait() == 0, job.output()
    assert sorted({line["restart"] for line in job.reports if "restart" in line}) == [0, 1, 2]


@pytest.mark.long
def test_a_plain_script_fails_for_good_with_torchs_summary() -> None:
    with Job("--standalone", "--nproc-per-node=2", "--max-restarts=1", PLAIN, "10", "99") as job:
        assert job.wait() == 1
    assert "Root Cause (first observed failure)" in "\n".join(job.text)


@pytest.mark.long
def test_a_flipped_bit_falls_back_to_the_snapshot_before(
    undisturbed: dict[str, object], run_dir: Path
) -> None:
    command = ("--standalone", "--nproc-per-node=2", "--run-dir", run_dir, TRAIN, "--snapshot-every=10")
    with Job(*command) as job:
        assert job.wait() == 0, job.output()
    before, damaged_entry = sorted(path.stem for path in (run_dir / "catalog").iterdir())[-2:]
    resumed_step = int(before.partition("-")[0])
    newest = max((run_dir / "packs").glob("*/*"), key=lambda pack: pack.stat().st_mtime)
    damaged = bytearray(newest.read_bytes())
    damaged[-5] ^= 1
    newest.write_bytes(damaged)
    with Job(*command) as job:
        assert job.wait() == 0, job.output()
    assert job.steps() == list(range(resumed_step + 1, 41)), (
        "steps are counted from the snapshot that was used"
    )
    assert job.wait_for(lambda line: "digest" in line)["digest"] == undisturbed["digest"]
    assert events(run_dir, "snapshot.rejected")[0]["entry"] == damaged_entry
    assert any(f"snapshot {damaged_entry} does not verify: packs/" in line for line in job.text)
    assert events(run_dir, "plan.decided")[-1]["step"] == resumed_step
