"""The processes of one part: started, listened to, bounded in time, and gone afterwards with all they started."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import psutil

from autoglm_elastic.bench.checkpoint.measure import Processes
from autoglm_elastic.bench.checkpoint.spec import RESULT, Rows, Spec
from autoglm_elastic.bench.marks import MARK
from autoglm_elastic.errors import PlatformError

PART_S: Final = 3600.0
SILENCE_S: Final = 300.0
"""No line for so long is a hang: no single measurement may take that long."""
KILL_WAIT_S: Final = 20.0
KILL_ROUNDS: Final = 2
"""A second look, for what was being forked during the first."""
TAIL_BYTES: Final = 3000
READ_BYTES: Final = 65536


def run(spec: Spec, say: Callable[[str], None]) -> Rows:
    """Rank 0's result. Raises PlatformError with the last lines of the rank that failed, or that hung."""
    folder = Path(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
    environment = {**os.environ, MARK: spec.mark, "OMP_NUM_THREADS": str(spec.options.threads)}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(spec.world_size):
            ranks.append(_start(spec, rank, environment))
        _listen(ranks, folder, say)
        return msgspec.json.decode((folder / RESULT).read_bytes(), type=Rows)
    finally:
        stop(spec.mark, ranks)


def _start(spec: Spec, rank: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    folder = Path(spec.folder)
    command = [sys.executable, "-m", "autoglm_elastic.bench.checkpoint.worker"]
    command += [str(folder / "spec.json"), str(rank), str(os.getpid())]
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(spec.world_size)}
    with _log(folder, rank).open("wb") as log:
        return subprocess.Popen(
            command,
            env={**environment, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if rank == 0 else log,
            stderr=log,
        )


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _listen(ranks: list[subprocess.Popen[bytes]], folder: Path, say: Callable[[str], None]) -> None:
    """Until all have ended well."""
    output = ranks[0].stdout
    if output is None:
        raise PlatformError("rank 0 has no output")
    deadline = time.monotonic() + PART_S
    left = dict(enumerate(ranks))
    descriptors = {rank: os.pidfd_open(process.pid) for rank, process in left.items()}
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ, -1)
            for rank, descriptor in descriptors.items():
                selector.register(descriptor, selectors.EVENT_READ, rank)
            rest = b""
            while left:
                ready = selector.select(min(SILENCE_S, deadline - time.monotonic()))
                if not ready:
                    raise PlatformError(f"rank {min(left)} hangs\n{_tail(folder, min(left))}")
                for key, _ in ready:
                    if key.data == -1:
                        data = os.read(output.fileno(), READ_BYTES)
                        if not data:
                            selector.unregister(output)
                        *lines, rest = (rest + data).split(b"\n")
                        for line in lines:
                            say(line.decode(errors="replace"))
                        continue
                    rank = key.data
                    selector.unregister(descriptors[rank])
                    code = left.pop(rank).wait(KILL_WAIT_S)
                    if code != 0:
                        raise PlatformError(f"rank {rank} ended with code {code}\n{_tail(folder, rank)}")
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
        output.close()


def _tail(folder: Path, rank: int) -> str:
    return _log(folder, rank).read_bytes()[-TAIL_BYTES:].decode(errors="replace")


def stop(mark: str, ranks: list[subprocess.Popen[bytes]]) -> None:
    """Kill, by pid, whatever is left of them and what they started, and remove the shared memory they had open."""
    processes = Processes(mark)
    shared: set[str] = set()
    for _ in range(KILL_ROUNDS):
        left = processes.all()
        for process in left:
            shared |= _shared_memory(process)
            process.kill()
        psutil.wait_procs(left, timeout=KILL_WAIT_S)
    for rank in ranks:
        rank.wait(KILL_WAIT_S)
    for path in shared:
        Path(path).unlink(missing_ok=True)


def _shared_memory(process: psutil.Process) -> set[str]:
    try:
        paths = {mapped.path for mapped in process.memory_maps()}
    except psutil.Error:
        return set()
    return {path for path in paths if path.startswith("/dev/shm/") and os.path.exists(path)}  # noqa: S108
