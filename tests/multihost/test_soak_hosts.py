"""Half an hour of random faults on three hosts: workers, agents, hosts, members of etcd, links.

tests/run -m campaign tests/multihost/test_soak_hosts.py -s
(AUTOGLM_SOAK_S=7200 AUTOGLM_SOAK_SEED=7 for another one.)
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from agents import committed, losses
from etcd_cluster import Cluster, needs_etcd
from faults import Fault, Faults, table
from job import SCRIPTS, Job
from net import needs_hosts
from scene import BACK_S_MAX, MEMBERS, Scene, scene
from table import note

from autoglm_elastic.observe import metrics, report
from autoglm_elastic.observe.report import Incident, Report

SOAK_S = float(os.environ.get("AUTOGLM_SOAK_S", "1800"))
SEED = int(os.environ.get("AUTOGLM_SOAK_SEED", "1"))
LAST_STEPS = 50
PAUSE_S = 0.04
"""In each step: leaves the machine some time for recoveries."""
CALM_S_MAX = 1200.0
"""For the same training in one process, without pauses and faults."""

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(2 * SOAK_S + 1800), needs_hosts, needs_etcd]


def test_half_an_hour_of_random_faults_leaves_no_trace(tmp_path: Path) -> None:
    print(f"\nAUTOGLM_SOAK_SEED={SEED} AUTOGLM_SOAK_S={SOAK_S:.0f}")
    end = tmp_path / "end"
    training = (SCRIPTS / "endless.py", end, f"--pause-s={PAUSE_S}")
    with scene(tmp_path, training, flags=("--set=snapshot.interval_steps=100",)) as (here, etcd):
        faults = Faults(here, etcd, SEED)
        over = time.monotonic() + SOAK_S
        while time.monotonic() < over:
            faults.next()
        last = stop(here, end)
        assert keys(here, etcd) == 0, "the job has left something in etcd"
    check(here, faults.done, last)
    compare_with_an_undisturbed_run(here.run_dir, end, tmp_path / "calm", last)


def stop(here: Scene, end: Path) -> int:
    """The step that the job then ends with."""
    last = here.step + LAST_STEPS
    new = end.with_suffix(".new")
    new.write_text(str(last))
    new.rename(end)
    assert [job.wait(BACK_S_MAX) for job in here.jobs.values()] == [0] * len(here.jobs), here.output()
    return last


def keys(here: Scene, etcd: Cluster) -> int:
    every = {"key": "AA==", "range_end": "AA=="}
    told = here.network[MEMBERS[0]].ask(lambda: etcd.ask(0, "kv/range", every))
    return int(told.get("count", 0))


def check(here: Scene, faults: Sequence[Fault], last: int) -> None:
    """The invariants, and that the report explains whatever happened."""
    here.check()
    assert [step for _, step in committed(here.run_dir)] == list(range(1, last + 1))
    told = report.build(here.run_dir)
    assert told.status == "done"
    assert told.log_faults == 0
    assert any(snapshot.outcome == "committed" for snapshot in told.snapshots)
    assert all(incident.closed is not None and incident.reason for incident in told.incidents)
    assert {incident.steps_lost for incident in told.incidents} <= {0}
    assert shown(here.run_dir) == len(told.incidents)
    took = recoveries(here.run_dir, told, faults)
    for kind, of_kind in table(faults).items():
        seconds = [took[fault.at] for fault in of_kind]
        broken = sum(bool(caused(told, fault)) for fault in of_kind)
        outcome = "no step lost" if broken else "steps go on"
        if 0 < broken < len(of_kind):
            outcome = f"no step lost; {broken} broke the world"
        note(
            f"soak: {kind}, {len(of_kind)}x",
            f"{outcome}; worst {max(seconds):.2f} s",
            statistics.median(seconds),
        )
    print(f"{len(faults)} faults, {len(told.incidents)} incidents, {last} steps, goodput {told.goodput:.1%}")


def shown(run_dir: Path) -> int:
    """How many incidents `autoglm report` tells of, each with its outcome."""
    command = [sys.executable, "-m", "autoglm_elastic.cli.main", "report", str(run_dir)]
    text = subprocess.run([*command, "--all"], capture_output=True, text=True, check=True, timeout=100).stdout
    assert "not recovered" not in text, text
    told = json.loads(
        subprocess.run([*command, "--json"], capture_output=True, check=True, timeout=100).stdout
    )
    assert text.count("next new step") == len(told["incidents"])
    return len(told["incidents"])


def caused(told: Report, fault: Fault) -> list[Incident]:
    """Opened between the fault and the time when everybody trained again."""
    return [incident for incident in told.incidents if fault.at <= incident.opened <= fault.over]


def recoveries(run_dir: Path, told: Report, faults: Sequence[Fault]) -> dict[float, float]:
    """By time of the fault: seconds until the last incident that it caused was over, or else to the next step."""
    commits = sorted(row.wall_time for row in metrics.read(run_dir / "metrics.jsonl"))
    took, explained = {}, 0
    for fault in faults:
        incidents = caused(told, fault)
        assert incidents or not fault.breaks, f"the report has no incident for {fault}"
        explained += len(incidents)
        closed = [incident.closed for incident in incidents if incident.closed is not None]
        after = max(closed) if closed else next(commit for commit in commits if commit > fault.at)
        took[fault.at] = after - fault.at
    assert explained == len(told.incidents), "an incident without a fault"
    return took


def compare_with_an_undisturbed_run(run_dir: Path, end: Path, calm_dir: Path, last: int) -> None:
    arguments = ("--nproc-per-node=1", "--run-dir", calm_dir, SCRIPTS / "endless.py", end)
    with Job("--standalone", *arguments) as job:
        assert job.wait(CALM_S_MAX) == 0
    calm, disturbed = losses(calm_dir), losses(run_dir)
    generations = {generation for generation, _ in committed(run_dir)}
    assert len(disturbed) >= last - len(generations)
    assert disturbed == {step: pytest.approx(calm[step], rel=1e-3) for step in disturbed}
