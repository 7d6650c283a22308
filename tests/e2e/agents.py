"""Several agents of one job, on this machine, for end-to-end tests."""

from __future__ import annotations

import itertools
import json
import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job import Job, Line

from autoglm_elastic.core.lineage import GenerationRecord, spans
from autoglm_elastic.observe import metrics


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The fields of the events of that name, in order."""
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [record["fields"] for record in map(json.loads, lines) if record["name"] == name]


def agent(
    port: int, run_dir: Path, *arguments: str | os.PathLike[str], nodes: str = "1:2", nproc: int = 2
) -> Job:
    """One agent of the job whose store is at `port`; `arguments`: more flags, the script, its own."""
    return Job(
        f"--nnodes={nodes}", f"--nproc-per-node={nproc}", "--rdzv-backend=autoglm",
        f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=agents", "--run-dir", run_dir, *arguments,
    )  # fmt: skip


def host_first(run_dir: Path, *jobs: Job) -> list[Job]:
    """The same jobs, the one that hosts the store first."""
    host = next(
        started["pid"] for started in reversed(events(run_dir, "job.started")) if started["hosts_store"]
    )
    return sorted(jobs, key=lambda job: job.process.pid != host)


def wait_for(jobs: list[Job], wanted: Callable[[Line], bool], timeout_s: float = 60.0) -> tuple[Job, Line]:
    """The first report, past or future, of any of them that is wanted."""
    deadline = time.monotonic() + timeout_s
    open_ones = list(jobs)
    while True:
        for job in jobs:
            for line in job.reports:
                if wanted(line):
                    return job, line
        left = deadline - time.monotonic()
        outputs = [job.process.stdout for job in open_ones if job.process.stdout is not None]
        ready = left > 0 and outputs and select.select(outputs, [], [], left)[0]
        assert ready, f"not reported within {timeout_s} s\n" + "\n".join(job.output() for job in jobs)
        open_ones = [job for job in open_ones if job.read()]


def wait(*jobs: Job, timeout_s: float = 90.0) -> list[int]:
    """Read all to the end; their exit codes."""
    return [job.wait(timeout_s) for job in jobs]


def committed(run_dir: Path) -> list[tuple[int, int]]:
    """(generation, step) of every step that rank 0 committed, in order."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["generation"], line["step"]) for line in lines]


def assert_each_step_once(run_dir: Path) -> None:
    """Every step from the first to the last was committed, in order, and none again."""
    assert_chain(committed(run_dir))


def assert_chain(steps: list[tuple[int, int]]) -> None:
    """(generation, step), as rank 0 wrote them: one after the other, whoever was rank 0 and died."""
    assert [step for _, step in steps] == list(range(1, len(steps) + 1)), steps
    assert steps == sorted(steps)


def in_lineage(run_dir: Path) -> list[tuple[int, int]]:
    """(generation, step) of the steps that count, in the order in which they were committed."""
    records = [
        GenerationRecord.from_json(json.loads(path.read_text()))
        for path in (run_dir / "generations").glob("*.json")
    ]
    line = spans(records)
    counted = []
    for generation, step in committed(run_dir):
        if generation in line:
            first, last = line[generation]
            if first < step and (last is None or step <= last):
                counted.append((generation, step))
    return counted


def losses(run_dir: Path) -> dict[int, float]:
    """By step, as all ranks have given them; of the last step before a death those of the dead are missing."""
    rows = metrics.lineage(metrics.read(run_dir / "metrics.jsonl"))
    whole = [row for row, after in itertools.pairwise(rows) if row.generation == after.generation]
    return {row.step: row.loss for row in [*whole, rows[-1]] if row.loss is not None}
