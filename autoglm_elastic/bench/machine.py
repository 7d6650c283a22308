"""Names the machine that numbers came from."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import psutil
import torch


def describe() -> dict[str, str]:
    """CPU model, cores that this process may use, memory, kernel, Python and torch."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    cores = len(os.sched_getaffinity(0))
    return {
        "cpu": f"{model[1].strip() if model else platform.machine()}, {cores} core{'s' * (cores != 1)}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def sentence(machine: dict[str, str]) -> str:
    return ", ".join(
        value if key in {"cpu", "kernel"} else f"{key} {value}" for key, value in machine.items()
    )
