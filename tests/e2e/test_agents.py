"""Two agents of one job: told to stop, cut off, stuck, and separated from the store. Real processes, real sockets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from agents import agent, assert_each_step_once, committed, events, free_port, host_first, wait, wait_for
from job import SCRIPTS, Job
from proxy import Proxy

TRAIN = SCRIPTS / "train.py"
ENDLESS = "--steps=5000"
"""More than any of these tests sees: they stop the job."""


def joined(job: Job) -> int:
    """Wait until both agents train together; the step."""
    _, line = wait_for([job], lambda line: line.get("world") == 4 and "step" in line)
    return int(line["step"])


def status(run_dir: Path) -> dict[str, object]:
    """What `autoglm status --json` says."""
    done = subprocess.run(
        [sys.executable, "-m", "autoglm_elastic.cli.main", "status", run_dir, "--json"],
        capture_output=True,
        check=True,
    )
    told = json.loads(done.stdout)
    assert isinstance(told, dict)
    return told


@pytest.mark.long
def test_sigterm_to_one_agent_stops_the_job_with_a_snapshot_and_the_same_commands_resume(
    run_dir: Path,
) -> None:
    command = (TRAIN, "--pause-s=0.05")
    port = free_port()
    with agent(port, run_dir, *command) as one, agent(port, run_dir, *command) as other:
        wait_for([one, other], lambda line: line.get("step", 0) >= 10 and line["world"] == 4)
        host_first(run_dir, one, other)[1].process.send_signal(signal.SIGTERM)
        assert wait(one, other) == [75, 75]
        assert "stopped on request, with a snapshot" in one.output()
    with agent(port, run_dir, *command) as one, agent(port, run_dir, *command) as other:
        assert wait(one, other) == [0, 0]
    assert_each_step_once(run_dir)
    assert committed(run_dir)[-1][1] == 40


@pytest.mark.long
def test_a_job_whose_agents_are_killed_was_cut_off_and_the_same_command_resumes(run_dir: Path) -> None:
    command = (TRAIN, "--pause-s=0.05", "--snapshot-every=5", ENDLESS)
    port = free_port()
    with agent(port, run_dir, *command) as one, agent(port, run_dir, *command) as other:
        wait_for([one, other], lambda line: line.get("step", 0) >= 12 and line["world"] == 4)
        first, second = host_first(run_dir, one, other)
        told = status(run_dir)
        assert (told["state"], told["alive"]) == ("running", True)
        for job in (second, first):
            job.process.kill()
            job.process.wait()
    told = status(run_dir)
    assert (told["state"], told["alive"]) == ("cut off", False)
    with agent(port, run_dir, *command, nodes="1:1") as job:
        job.wait_for(lambda line: "step" in line)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
    closed = events(run_dir, "incident.closed")[-1]
    assert closed["tier"] == "disk"
    assert closed["from_step"] >= 5
    assert job.steps()[0] == closed["from_step"] + 1
    assert status(run_dir)["state"] == "paused"


@pytest.mark.long
def test_a_survivor_on_the_other_node_that_is_stuck_in_c_is_killed_and_replaced(
    run_dir: Path, tmp_path: Path
) -> None:
    command = (
        "--set=recovery.unwind_limit_s=1", TRAIN, "--pause-s=0.02",
        "--snapshot-every=5", "--stuck-rank=1", "--stuck-step=15", f"--once={tmp_path / 'once'}",
    )  # fmt: skip
    port = free_port()
    with (
        agent(port, run_dir, *command, nodes="2:2", nproc=1) as one,
        agent(port, run_dir, *command, nodes="2:2", nproc=1) as other,
    ):
        stuck, _ = wait_for([one, other], lambda line: "stuck" in line)
        (other if stuck is one else one).kill_worker(0)
        assert wait(one, other) == [0, 0]
    assert [event["rank"] for event in events(run_dir, "worker.stuck")] == [1]
    assert events(run_dir, "incident.closed")[-1]["tier"] == "disk"


@pytest.mark.long
def test_an_agent_that_loses_sight_of_the_store_for_a_while_goes_on(run_dir: Path) -> None:
    command = ("--set=membership.lease_s=60", TRAIN, "--pause-s=0.02", ENDLESS)
    port = free_port()
    with agent(port, run_dir, *command) as host:
        wait_for([host], lambda line: "step" in line)
        with Proxy(port) as proxy, agent(proxy.port, run_dir, *command) as other:
            step = joined(other)
            proxy.hold()
            wait_for([other], lambda line: line.get("step", 0) >= step + 10)
            proxy.heal()
            wait_for([other], lambda line: line.get("step", 0) >= step + 20)
            host.process.send_signal(signal.SIGTERM)
            assert wait(host, other) == [75, 75]
    assert len(events(run_dir, "generation.sealed")) == 2, "one node, then both"
    assert_each_step_once(run_dir)


@pytest.mark.long
def test_a_connection_to_the_store_that_breaks_again_and_again_costs_no_step(run_dir: Path) -> None:
    """Whether the agent is back in time to keep its lease, or has to leave, is the machine's choice."""
    command = (TRAIN, "--pause-s=0.02", ENDLESS)
    port = free_port()
    with agent(port, run_dir, *command) as host:
        wait_for([host], lambda line: "step" in line)
        with Proxy(port) as proxy, agent(proxy.port, run_dir, *command) as other:
            step = joined(other)
            for more in (4, 8, 12):
                proxy.reset()
                wait_for([host], lambda line, past=step + more: line.get("step", 0) >= past)
            host.process.send_signal(signal.SIGTERM)
            assert host.wait() == 75, host.output()
            assert other.wait() in (75, 1), other.output()
    assert_each_step_once(run_dir)


@pytest.mark.long
@pytest.mark.parametrize("how", ["hold", "refuse"])
def test_an_agent_that_is_cut_off_from_the_store_fences_itself_and_comes_back(
    how: str, run_dir: Path
) -> None:
    command = (TRAIN, "--pause-s=0.05", ENDLESS)
    port = free_port()
    with agent(port, run_dir, *command) as host:
        wait_for([host], lambda line: "step" in line)
        with Proxy(port) as proxy, agent(proxy.port, run_dir, *command) as other:
            step = joined(other)
            getattr(proxy, how)()
            _, alone = wait_for([host], lambda line: line.get("world") == 2 and line.get("step", 0) > step)
            proxy.heal()
            wait_for([other], lambda line: line.get("world") == 4 and line.get("step", 0) > alone["step"])
            assert "rejoined the job as a new member" in other.output()
            host.process.send_signal(signal.SIGTERM)
            assert wait(host, other) == [75, 75]
    assert [closed["tier"] for closed in events(run_dir, "incident.closed")[1:]] == ["live"] * 3
    assert_each_step_once(run_dir)


@pytest.mark.long
def test_a_node_that_joins_as_the_job_ends_changes_nothing(run_dir: Path, tmp_path: Path) -> None:
    fifo, port = tmp_path / "fifo", free_port()
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDWR)
    command = (TRAIN, f"--linger={fifo}")
    with agent(port, run_dir, *command) as one:
        for rank in (0, 1):
            wait_for([one], lambda line, rank=rank: "final" in line and line["rank"] == rank)
        with agent(port, run_dir, *command) as other:
            wait_for([other], lambda line: "started" in line)
            os.write(held, b"go")
            assert wait(one, other) == [0, 0], one.output() + other.output()
    os.close(held)
    assert [sealed["planned"] for sealed in events(run_dir, "generation.sealed")] == [False, True]
    assert events(run_dir, "worker.died") == []
    assert len(events(run_dir, "worker.started")) == 4, "two a node, each once"
    assert len(events(run_dir, "job.finished")) == 1
    assert_each_step_once(run_dir)
