"""Figures on several hosts, for docs/benchmarks.md; run by name, on a machine with nothing else to do.

tests/run -m campaign tests/multihost -s
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agents import wait_for
from etcd_cluster import needs_etcd
from job import SCRIPTS, Job
from net import Network, needs_hosts
from scene import NODES, scene
from table import note

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3600), needs_hosts, needs_etcd]

LOSSES = int(os.environ.get("AUTOGLM_LOSSES", "20"))
LOAD_S = float(os.environ.get("AUTOGLM_LOAD_S", "600"))
TORCHRUN_LOSSES = 3
TORCHRUN_BACK_S_MAX = 120.0
LEASE_S = 2.0


def test_a_lost_node_costs_a_lease_and_half_a_second(tmp_path: Path) -> None:
    took = []
    with scene(tmp_path) as (here, _):
        for number in range(LOSSES):
            host = here.generations()[-1]["nodes"][0 if number % 2 else -1]
            here.lose(host)
            here.trains(2)
            took.append(here.recovery_s())
            here.network.plug(host)
            here.start(host)
            here.trains(3)
        here.end()
    median, worst = statistics.median(took), max(took)
    print(f"\n{LOSSES} nodes lost: median {median:.2f} s, worst {worst:.2f} s:", *(f"{s:.2f}" for s in took))
    note(f"a node lost, {LOSSES} times: median", f"worst {worst:.2f} s; no step lost", median)
    assert median <= LEASE_S + 0.5


def test_nobody_is_evicted_at_full_load(tmp_path: Path) -> None:
    with scene(tmp_path) as (here, _), load(2 * (os.cpu_count() or 1)):
        before = here.generations()
        over = time.monotonic() + LOAD_S
        first = here.trains(3, more=1)
        while time.monotonic() < over:
            last = here.trains(3, more=20)
        assert here.generations() == before
        print(f"\n{LOAD_S:.0f} s at full load, {last - first} steps: nobody evicted")
        here.end()


def test_torchrun_in_the_same_place(tmp_path: Path) -> None:
    """The same loss under torchrun's own rendezvous; whoever hosts its store stays."""
    for number in range(TORCHRUN_LOSSES):
        folder = tmp_path / str(number)
        folder.mkdir()
        took = seconds_of_torchrun(folder)
        print(
            f"\ntorchrun: next new step {'after' if took else 'not within'} {took or TORCHRUN_BACK_S_MAX:.2f} s"
        )
        outcome = "goes on" if took else "no new step until then"
        note("torchrun, c10d: a node lost", outcome, took or TORCHRUN_BACK_S_MAX)


def seconds_of_torchrun(folder: Path) -> float | None:
    """From the loss of a node to the next new step of the others; None when there is none."""
    with Network(folder, *NODES) as network:
        jobs = {host: torchrun(network, host, folder) for host in NODES}
        try:
            wait_for(list(jobs.values()), lambda line: line["world"] == 3 and line["step"] > 20, 120.0)
            network.lose(NODES[-1])
            gone_at = time.time()
            jobs[NODES[-1]].wait(60)
            done = max(line["step"] for job in jobs.values() for line in job.reports)
            others = [job for host, job in jobs.items() if host != NODES[-1]]
            with contextlib.suppress(AssertionError):
                _, new = wait_for(others, lambda line: line["step"] > done + 1, TORCHRUN_BACK_S_MAX)
                return float(new["at"] - gone_at)
            return None
        finally:
            for host in NODES:
                network[host].kill()
            for job in jobs.values():
                job.__exit__()


def torchrun(network: Network, host: str, folder: Path) -> Job:
    return Job(
        "--nnodes=1:3", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=job", "--max-restarts=100",
        f"--rdzv-endpoint={network[NODES[0]].address}:29500", f"--local-addr={network[host].address}",
        SCRIPTS / "saving_ddp.py", folder / "checkpoint.pt",
        module="torch.distributed.run", prefix=network[host].prefix,
    )  # fmt: skip


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()
