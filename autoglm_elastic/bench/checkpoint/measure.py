"""What a measurement needs in every rank: the clock, a barrier, the slowest rank's figure, the processor time
and memory of everything that the benchmark started."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Final

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from autoglm_elastic.bench.marks import marked

GROUP_S: Final = 300.0
SAMPLE_S: Final = 0.02
_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")

now = time.perf_counter


def barrier() -> None:
    """All ranks. (An all-reduce: gloo's barrier is no faster, and this needs no device.)"""
    dist.all_reduce(torch.zeros(1))


def slowest(*values: float) -> list[float]:
    """Each value's maximum over the ranks."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor]


def start_group(folder: Path, rank: int, world_size: int) -> None:
    """The default process group: gloo over loopback, met in a file of `folder`."""
    store = FileStore(str(folder / "store"), world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=GROUP_S)
    )


def own_group() -> dist.ProcessGroup:
    """A gloo group that nothing else uses: what runs beside the training must not share its messages."""
    group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=timedelta(seconds=GROUP_S))
    if group is None:
        raise RuntimeError("new_group gave no group")
    return group


class Processes:
    """Everything that was started by the benchmark, as the kernel sees it."""

    def __init__(self, mark: str) -> None:
        self._mark = mark

    def all(self) -> list[psutil.Process]:
        return marked(self._mark)

    def cpu_s(self) -> float:
        """User and system seconds, those of children that have ended included."""
        total = 0
        for process in self.all():
            try:
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            total += sum(int(fields[index]) for index in (11, 12, 13, 14))
        return total * _TICK_S

    def memory_bytes(self) -> int:
        """Proportional set sizes, and shared memory of the machine that none of the processes has mapped."""
        pss = shared = 0
        for process in self.all():
            try:
                text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            except OSError:
                continue
            fields = {line.partition(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
            pss += int(fields.get("Pss", 0)) << 10
            shared += int(fields.get("Pss_Shmem", 0)) << 10
        return pss + max(0, _shmem_bytes() - shared)


def _shmem_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) << 10
    return 0


@contextmanager
def peak_memory(processes: Processes) -> Iterator[list[int]]:
    """Samples while the block runs; the list holds the highest when it has ended."""
    highest = [0]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_S):
            highest[0] = max(highest[0], processes.memory_bytes())

    thread = threading.Thread(target=sample, name="bench-memory", daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        stop.set()
        thread.join(timeout=GROUP_S)
