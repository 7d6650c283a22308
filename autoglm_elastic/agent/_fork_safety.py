"""When a fork of the zygote would not be what a fresh `python script.py` is, and why.

Forking copies an interpreter that has already started and libraries that have already been imported. What
they read from the environment, the command line or `sys.path` while they started cannot be changed
afterwards, so a request that differs there is executed anew. Pure functions of facts; nothing here is changed
or started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from autoglm_elastic.agent.process import SpawnRequest

READ_AT_START: Final = (
    "LD_",
    "GLIBC_",
    "MALLOC_",
    "JEMALLOC_",
    "TCMALLOC_",
    "ASAN_",
    "LANG",
    "LC_",
    "PYTHON",
    "OMP_",
    "KMP_",
    "GOMP_",
    "MKL_",
    "OPENBLAS_",
    "GOTO_NUM_THREADS",
    "BLIS_",
    "DNNL_",
    "ONEDNN_",
    "ATEN_",
    "NPY_",
    "NUMEXPR_",
    "TORCH_",
    "TORCHDYNAMO_",
    "TORCHINDUCTOR_",
    "PYTORCH_",
    "TRITON_",
)
"""Prefixes of variables that the loader, the C library, the interpreter, OpenMP or torch read once, when they
start."""

READ_LATER: Final = (
    "OMP_NUM_THREADS",
    "PYTHONUNBUFFERED",
    "PYTHONSTARTUP",
    "PYTHON_EXEC",
    "TORCH_NCCL_",
    "TORCH_GLOO_",
    "TORCH_FR_",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
)
"""Exceptions: set again in the worker (OMP_NUM_THREADS), without effect there, or read when first used."""


@dataclass(frozen=True, slots=True)
class ZygoteFacts:
    """What a zygote is, once its imports are done.

    Args:
        env: its environment when it started.
        cwd: its working directory when it started.
        flags_differ: the launcher's interpreter runs with flags that a fresh one would not have.
        cuda: CUDA has been initialized in it or before it was forked.
        threads: how many it keeps, 1 if it is as it should be.
        startup_modules: names in `sys.modules` of an interpreter that has just started.
    """

    env: Mapping[str, str]
    cwd: str
    flags_differ: bool
    cuda: bool
    threads: int
    startup_modules: frozenset[str]


def fork_unsafe_reason(request: SpawnRequest, facts: ZygoteFacts, *, threads: int) -> str | None:
    """Why `request` must be executed anew, in one clause; None when a fork will do.

    Args:
        threads: how many threads the zygote has at this moment.
    """
    if not request.fork:
        return "asked for"
    if request.python_script() is None:
        return f"the command is not `{sys.executable} -u [-m] script`"
    if facts.flags_differ:
        return "the launcher's interpreter was started with flags of its own"
    if threads != 1:
        return f"a preloaded module keeps {threads - 1} threads running"
    if facts.cuda:
        return "CUDA was initialized before the fork"
    changed = sorted(
        name
        for name in request.env.keys() | facts.env.keys()
        if request.env.get(name) != facts.env.get(name) and _read_at_start(name)
    )
    if "OMP_NUM_THREADS" in facts.env and "OMP_NUM_THREADS" not in request.env:
        changed.append("OMP_NUM_THREADS")
    if changed:
        return f"{', '.join(changed)}: read when Python or torch starts, and other than the launcher's"
    path = request.env.get("PYTHONPATH", "")
    moved = request.cwd is not None and os.path.realpath(request.cwd) != os.path.realpath(facts.cwd)
    if moved and path and not all(os.path.isabs(folder) for folder in path.split(os.pathsep)):
        return "PYTHONPATH is relative and the working directory another"
    return None


def shadowed_module(folder: str, startup_modules: frozenset[str]) -> str | None:
    """A module that is imported already, but that a fresh interpreter with `sys.path[0] == folder` would find
    there."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return None
    for entry in entries:
        name = entry.name.partition(".")[0]
        loaded = sys.modules.get(name)
        if loaded is None or name in startup_modules or name in sys.builtin_module_names:
            continue
        if entry.name == name:
            found = os.path.join(entry.path, "__init__.py")
            if not os.path.exists(found):
                continue
        elif entry.name.endswith((".py", ".so")):
            found = entry.path
        else:
            continue
        origin = getattr(loaded, "__file__", None)
        if origin is None or os.path.realpath(origin) != os.path.realpath(found):
            return name
    return None


def _read_at_start(name: str) -> bool:
    return name.startswith(READ_AT_START) and not name.startswith(READ_LATER)
