"""How long a job takes to its first step, and how much memory it then holds: both launchers, the same
script."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from autoglm_elastic.bench.jobs import Job, Mode
from autoglm_elastic.bench.kills import HANG_S, Stuck

STEADY_STEP: Final = 4
"""By then every buffer of a training step has been allocated."""


@dataclass(frozen=True, slots=True)
class Start:
    """`first_step_s`: from the command to the moment when the last of the ranks has done its first step."""

    mode: str
    first_step_s: float
    pss_bytes: int


def measure(mode: Mode, workers: int, *, width: int | None = None) -> Start:
    """Start a job, wait for its first step, weigh it at a steady one, kill it. Raises Stuck when it does not
    start."""
    job = Job(mode, workers, width=width)
    try:
        first: dict[int, int] = {}
        latest: dict[int, int] = {}
        deadline = time.monotonic() + HANG_S
        while len(latest) < workers or min(latest.values()) < STEADY_STEP:
            line = job.line(deadline)
            if line is None:
                raise Stuck(job.why())
            if line.what == "step":
                first.setdefault(line.rank, line.wall_ns)
                latest[line.rank] = line.step
        return Start(mode.name, (max(first.values()) - job.started_wall_ns) / 1e9, job.pss_bytes())
    finally:
        job.stop()
