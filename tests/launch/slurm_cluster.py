"""A real Slurm of three nodes on this machine, for tests: munged, slurmctld and three slurmd, all in one folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

NODES = ("n1", "n2", "n3")
WAIT_S = 90.0
POLL_S = 0.2
SBIN = "/usr/sbin:/sbin"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
_PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:{SBIN}"

needs_slurm = pytest.mark.skipif(
    os.getuid() != 0 or any(shutil.which(program, path=_PATH) is None for program in _PROGRAMS),
    reason="no Slurm, or not root",
)

_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=3
InactiveLimit=0
JobRequeue=1
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n[1-3] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports}] CPUs=2 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The daemons, and what a user does with them. `environment`: for a user's commands and the job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        (folder / "state").mkdir(parents=True)
        first = _free_run_of_ports(len(NODES) + 1)
        text = _CONF.format(folder=folder, controller=first, ports=f"{first + 1}-{first + len(NODES)}")
        (folder / "slurm.conf").write_text(text)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key} | {
            name: folder / f"munge.{name.removesuffix('-file')}"
            for name in ("socket", "pid-file", "log-file", "seed-file")
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._start(
            "munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())
        )
        self.until("munged listens", (folder / "munge.socket").exists)
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.until("all nodes are idle", lambda: self.tell("sinfo", "-h", "-o", "%D %t") == "3 idle")

    def __enter__(self) -> Slurm:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Everything that knows this cluster ends: daemons, steps, and what ran in them."""
        mine = [process for process in psutil.process_iter() if self._is_mine(process)]
        for process in mine:
            _quietly(process.kill)
        for daemon in self._daemons.values():
            daemon.wait(WAIT_S)
        psutil.wait_procs(mine, timeout=WAIT_S)

    def start_node(self, node: str) -> None:
        self._start(node, "-D", "-N", node, program="slurmd")

    def kill_node(self, node: str) -> None:
        """SIGKILL to whatever runs of it: slurmd, steps and agents."""
        daemon = psutil.Process(self._daemons[node].pid)
        steps = [
            process
            for process in psutil.process_iter()
            if self._is_mine(process) and f"SLURMD_NODENAME={node}" in _variables(process)
        ]
        stepds = [step.parent() for step in steps]
        for process in (daemon, *stepds, *steps):
            if process is not None and self._is_mine(process):
                _quietly(process.kill)
        self._daemons[node].wait(WAIT_S)

    def submit(self, *arguments: str | os.PathLike[str], **environment: str) -> int:
        """`sbatch`; the job's number. Its output is in `folder/out-<number>`."""
        return int(
            self.tell(
                "sbatch",
                "--parsable",
                f"--output={self.folder}/out-%j",
                f"--chdir={self.folder}",
                *map(os.fspath, arguments),
                **environment,
            )
        )

    def output(self, job: int) -> str:
        path = self.folder / f"out-{job}"
        return path.read_text() if path.exists() else ""

    def state(self, job: int) -> str:
        return self.show(job)["JobState"]

    def show(self, job: int) -> dict[str, str]:
        """`scontrol show job`, by field."""
        words = self.tell("scontrol", "--oneliner", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_again(self, job: int, *, minutes: int) -> None:
        """A job that was queued again, with another time limit, soon: Slurm would let it wait for two minutes.

        Not at once: a node refuses a job that it was told to end in the same second."""
        self.until("the job is queued again", lambda: self.state(job) == "PENDING")
        self.tell("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}", "StartTime=now+3")

    def tell(self, *command: str, **environment: str) -> str:
        done = subprocess.run(
            command,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def until(self, what: str, holds: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        """Slurm can only be asked."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"{path.name}:\n{path.read_text(errors='replace')[-2500:]}"
                    for path in [*self.folder.glob("*.log"), *self.folder.glob("out-*")]
                )
                raise AssertionError(f"not within {timeout_s} s: {what}\n{logs}")
            time.sleep(POLL_S)

    def _start(self, name: str, *arguments: str, program: str = "") -> None:
        with (self.folder / f"{name}.stderr").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [program or name, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _is_mine(self, process: psutil.Process) -> bool:
        return process.pid != os.getpid() and f"SLURM_CONF={self.folder}/slurm.conf" in _variables(process)


def _variables(process: psutil.Process) -> list[str]:
    """slurmstepd writes a title over the beginning of its environment, where psutil stops reading."""
    try:
        data = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return []
    return data.decode(errors="replace").split("\0")


def _quietly(action: Callable[[], object]) -> None:
    try:
        action()
    except psutil.NoSuchProcess:
        return


def _free_run_of_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody uses."""
    for first in range(27000, 32000, count):
        probes: list[socket.socket] = []
        try:
            probes += [socket.create_server(("", first + index)) for index in range(count)]
            return first
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no free ports")
