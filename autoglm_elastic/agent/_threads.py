"""How many threads the zygote has (one) and with how many a worker forked from it will compute."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

from autoglm_elastic.agent import _linux

THREAD_END_S: Final = 1.0
"""A joined thread is listed until the kernel has let go of it, microseconds later; nothing tells when."""


def settled_threads(kept: int = 1) -> int:
    """Threads of this process, once those of OpenBLAS have been stopped.

    Importing NumPy starts them. OpenBLAS's own handler of `fork` stops them until they are needed again, so a
    fork that does nothing is the way to get rid of them.

    Args:
        kept: how many are known to stay, so that nothing is waited for.
    """
    if _linux.thread_count() > kept and threading.active_count() == 1:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        deadline = time.monotonic() + THREAD_END_S
        while _linux.thread_count() > kept and time.monotonic() < deadline:
            os.sched_yield()
    return _linux.thread_count()


class ComputeThreads:
    """What torch and OpenBLAS were set to when they were imported, and how to let it follow OMP_NUM_THREADS."""

    def __init__(self, env: Mapping[str, str]) -> None:
        from threadpoolctl import ThreadpoolController

        self._torch: Any = sys.modules["torch"]
        self._openblas: list[Any] = ThreadpoolController().select(internal_api="openblas").lib_controllers
        self._openblas_initial = [library.num_threads for library in self._openblas]
        self._torch_initial: int = self._torch.get_num_threads()
        cores = len(os.sched_getaffinity(0))
        # torch with MKL takes no more threads than there are cores, which its own choice shows.
        self._torch_most = cores if env.get("OMP_NUM_THREADS") else self._torch_initial

    def before_fork(self, env: Mapping[str, str]) -> None:
        """In the zygote: OpenBLAS as in a process that starts with `env`.

        OpenBLAS starts threads when it is told a number; `settled_threads` stops them, the number stays.
        """
        wanted = _wanted(env)
        # Its own variables come first with OpenBLAS; a change of those is a reason not to fork at all.
        given = env.get("OPENBLAS_NUM_THREADS") or env.get("GOTO_NUM_THREADS")
        for library, initial in zip(self._openblas, self._openblas_initial, strict=True):
            threads = initial if given or wanted is None else wanted
            if library.num_threads != threads:
                library.set_num_threads(threads)

    def after_fork(self, env: Mapping[str, str]) -> None:
        """In the worker: torch as in a process that starts with `env`.

        Not in the zygote: torch starts a pool (pthreadpool's) when the number grows, and nothing stops it again.
        """
        wanted = _wanted(env)
        threads = self._torch_initial if wanted is None else min(wanted, self._torch_most)
        if self._torch.get_num_threads() != threads:
            self._torch.set_num_threads(threads)


def _wanted(env: Mapping[str, str]) -> int | None:
    text = env.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) > 0 else None
