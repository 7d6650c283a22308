"""A Docker daemon: the one that runs here already, or one of our own in namespaces of its own, without a network to the
outside, which leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from tools import Skip, run, say, works

START_S = 60.0
STOP_S = 30.0
FREE_BYTES_MIN = 12 << 30
"""Base image, wheels, and three images with all layers that were made on the way: about 8 GB."""

_CONTROLLERS = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids")
_CGROUPS = Path("/sys/fs/cgroup")
_READY = b"API listen on"

_IN_ITS_NAMESPACES = """
set -eu
ip link set lo up
if [ ! -e /sys/fs/cgroup/cgroup.controllers ]; then
    umount -l /sys/fs/cgroup/* 2>/dev/null || true
    for controller in {controllers}; do
        mkdir -p /sys/fs/cgroup/$controller
        mount -t cgroup -o $controller cgroup /sys/fs/cgroup/$controller
    done
fi
mount -t tmpfs tmpfs /run
exec dockerd --data-root "$1/data" --exec-root /run/docker --pidfile /run/docker.pid --host "unix://$1/docker.sock"
""".format(controllers=" ".join(_CONTROLLERS))


@dataclass(frozen=True)
class Daemon:
    """`env`: what a docker command needs to reach it. `is_ours`: it has no network to the outside."""

    env: dict[str, str]
    is_ours: bool


@contextmanager
def daemon(folder: Path) -> Iterator[Daemon]:
    """Raises `Skip` where none runs and none can be started. `folder`: of ours alone, for its data."""
    if shutil.which("docker") is None:
        raise Skip("no docker on PATH")
    if works("docker", "info"):
        say("a Docker daemon runs here; it is used")
        yield Daemon({}, is_ours=False)
        return
    for holds, reason in (
        (os.getuid() == 0, "no Docker daemon runs here, and only root may start one"),
        (shutil.which("dockerd") is not None, "no Docker daemon runs here, and there is no dockerd"),
        (shutil.which("iptables") is not None, "no iptables, without which dockerd makes no networks"),
        (works("unshare", "-mnCuipf", "true"), "no Docker daemon runs here, and no namespaces can be made"),
    ):
        if not holds:
            raise Skip(reason)
    with _our_own(folder) as env:
        yield Daemon(env, is_ours=True)


@contextmanager
def _our_own(folder: Path) -> Iterator[dict[str, str]]:
    before = _cgroups()
    process = subprocess.Popen(
        [
            *("unshare", "-m", "-n", "-C", "-u", "-i", "-p", "-f", "--mount-proc", "--kill-child"),
            *("--propagation", "private", "bash", "-c", _IN_ITS_NAMESPACES, "dockerd", str(folder)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # an interrupt of the terminal is ours to handle
    )
    log: list[bytes] = []
    settled = threading.Event()
    drain = threading.Thread(target=_drain, args=(process, log, settled), daemon=True)
    drain.start()
    try:
        settled.wait(START_S)
        if not any(_READY in line for line in log):
            last = log[-1].decode(errors="replace").strip() if log else "it said nothing"
            raise Skip(f"a Docker daemon of our own did not start: {last}")
        env = {"DOCKER_HOST": f"unix://{folder}/docker.sock"}
        driver = run("docker", "info", "--format", "{{.Driver}}", timeout_s=START_S, env=env).strip()
        if driver == "vfs":
            raise Skip(f"the file system of {folder} cannot hold layers of images (storage driver vfs)")
        say(f"started a Docker daemon (storage driver {driver})")
        yield env
    finally:
        _stop(process)
        drain.join(STOP_S)
        for path in sorted(_cgroups() - before, reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir()


def _drain(process: subprocess.Popen[bytes], log: list[bytes], settled: threading.Event) -> None:
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            log[:] = [*log[-20:], line]
            if _READY in line:
                settled.set()
    settled.set()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the daemon, the only child of `unshare`, and with it all processes in its namespace; then `unshare` ends."""
    for child in psutil.Process(process.pid).children() if process.poll() is None else ():
        child.kill()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_S)


def _cgroups() -> set[Path]:
    return {path for path in _CGROUPS.glob("*/**/docker/**") if path.is_dir()}
