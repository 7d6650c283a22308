"""One benchmarked job: a launcher, a training, a folder of its own; started, read, measured, killed.

Every process of a job carries a mark in its environment, so that all of it is found, also what left the
process tree.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from autoglm_elastic.bench.marks import MARK, marked
from autoglm_elastic.bench.steplog import Line, StepLog
from autoglm_elastic.errors import PlatformError, UsageError

SCRIPTS: Final = Path(__file__).parent / "scripts"
RESTARTS: Final = 100_000
"""So many failures are never the reason for an end."""
KILL_WAIT_S: Final = 20.0
KILL_ROUNDS: Final = 2
"""A second look, for what was being forked during the first."""
LOG_TAIL_BYTES: Final = 2000


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to run the training."""

    name: str
    title: str
    launcher: str
    script: str
    environment: Mapping[str, str] = field(default_factory=dict)


MODES: Final = {
    mode.name: mode
    for mode in (
        Mode("torchrun", "torchrun, as shipped", "torchrun", "mlp_ddp.py"),
        Mode(
            "torchrun-own-store",
            "torchrun, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            "torchrun",
            "mlp_ddp.py",
            {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        ),
        Mode("unmodified", "autoglm-run, the same script", "autoglm-run", "mlp_ddp.py"),
        Mode("elastic", "autoglm-run, five lines changed", "autoglm-run", "mlp_elastic.py"),
    )
}


def modes_named(names: list[str] | None) -> list[Mode]:
    """All modes, or those named. Raises UsageError for a name that is none."""
    for name in names or ():
        if name not in MODES:
            raise UsageError(
                f"mode {name!r}", valid=", ".join(MODES), do="name some of these, or none for all"
            )
    return [mode for mode in MODES.values() if not names or mode.name in names]


def _launcher(name: str) -> list[str]:
    if name == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run"]
    beside = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    if beside is None:
        raise PlatformError(f"no {name} beside {sys.executable}", do="pip install autoglm-elastic here")
    return [beside]


class Job:
    """A running job. `started`: monotonic seconds at which its command was given."""

    def __init__(self, mode: Mode, workers: int, *, width: int | None = None) -> None:
        self.mode, self.workers = mode, workers
        self.folder = Path(tempfile.mkdtemp(prefix="autoglm-bench-"))
        self.log = StepLog(self.folder / "steps")
        self._mark = uuid.uuid4().hex
        self._output = (self.folder / "output").open("wb")
        command = _launcher(mode.launcher)
        command += ["--standalone", f"--nproc-per-node={workers}", f"--max-restarts={RESTARTS}"]
        if mode.launcher == "autoglm-run":
            command.append(f"--run-dir={self.folder / 'run'}")
        command.append(str(SCRIPTS / mode.script))
        environment = {
            **os.environ,
            **mode.environment,
            MARK: self._mark,
            "BENCH_LOG": str(self.log.path),
            "BENCH_DIR": str(self.folder),
            "BENCH_WORKERS": str(workers),
        }
        if width is not None:
            environment["BENCH_WIDTH"] = str(width)
        self.started_wall_ns = time.time_ns()
        self._launched = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT
        )
        self._pidfd = os.pidfd_open(self._launched.pid)

    def line(self, deadline: float) -> Line | None:
        """The next line of the training; None past `deadline` (monotonic) or when the launcher has ended."""
        return self.log.line(deadline, self._pidfd)

    @property
    def ended(self) -> bool:
        return self._launched.poll() is not None

    def why(self) -> str:
        """Why there are no more lines, for a person."""
        if not self.ended:
            return f"{self.mode.title}: hung, no new step in time"
        data = (self.folder / "output").read_bytes()[-LOG_TAIL_BYTES:]
        return (
            f"{self.mode.title}: ended with code {self._launched.returncode}\n{data.decode(errors='replace')}"
        )

    def processes(self) -> list[psutil.Process]:
        """Launcher, workers and whatever they started."""
        return marked(self._mark)

    def pss_bytes(self) -> int:
        """Proportional set size of all its processes: shared pages are counted once."""
        total = 0
        for process in self.processes():
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total

    def stop(self) -> None:
        """Kill all of it, by pid, and remove its folder."""
        self._launched.kill()
        self._launched.wait(KILL_WAIT_S)
        for _ in range(KILL_ROUNDS):
            processes = self.processes()
            for process in processes:
                process.kill()
            psutil.wait_procs(processes, timeout=KILL_WAIT_S)
        os.close(self._pidfd)
        self._output.close()
        self.log.close()
        shutil.rmtree(self.folder)


def age_s(pid: int, wall_ns: int) -> float | None:
    """How old process `pid` was at `wall_ns`, to the kernel's 10 ms; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    since_line_s = (time.time_ns() - wall_ns) / 1e9
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s - since_line_s
