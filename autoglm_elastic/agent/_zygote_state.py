"""Making a process fit to be forked: leave the agent's things behind, import, and know what came of it.

Called by the zygote only, before and between forks. The launcher's traces (hooks, handlers, descriptors) are
removed once, at the start; what preloaded modules set up afterwards is kept, since a script that imports them
expects it.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import dataclasses
import faulthandler
import gc
import importlib
import linecache
import logging
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Sequence
from typing import Any, Final

from autoglm_elastic.agent import _linux, _threads, worker_main
from autoglm_elastic.agent._fork_safety import ZygoteFacts
from autoglm_elastic.agent.signals import STOP_SIGNALS

ALWAYS_IMPORTED: Final = ("torch", "torch._dynamo", "autoglm_elastic.training.run")
"""Every optimizer imports torch._dynamo when it is built: 0.7 s, paid once here; `elastic.run` takes 0.3 s."""

_STARTUP_QUERY: Final = (
    "import sys; print(ascii("
    "(sys.path, list(sys.modules), tuple(sys.flags), sys.warnoptions, sys._xoptions)))"
)
_STARTUP_QUERY_S: Final = 60.0
"""A bare interpreter answers in 20 ms; a cold network file system may take seconds."""

_UTF8_MODE: Final = sys.flags.__match_args__.index("utf8_mode")

_CUDA_NOT_INITIALIZED: Final = 3

AGENTS_SIGNALS: Final = (signal.SIGINT, *STOP_SIGNALS)
"""Schedulers send these to every process of a job. What they mean is the agent's to decide: the zygote ends with it,
and would take the workers along before they have committed a snapshot."""


class PreloadError(Exception):
    """A module that workers need cannot be imported; one line."""


def detach(agent_pid: int, control_fd: int, *, forked: bool) -> worker_main.FreshState:
    """Leave the agent's session, descriptors, signal handlers and hooks.

    Args:
        forked: by the agent's main thread; then end with it also while importing. An executed zygote must not: the
            kernel would end it with the thread that started it.
    """
    if forked:
        _linux.die_with_parent(agent_pid)
    with contextlib.suppress(PermissionError):
        os.setsid()
    ignored = {number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN}
    ignored -= {signal.SIGPIPE, signal.SIGXFSZ}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    signal.set_wakeup_fd(-1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if faulthandler.is_enabled() and not os.environ.get("PYTHONFAULTHANDLER") and not sys.flags.dev_mode:
        faulthandler.disable()
    _default_signals(ignored)
    _close_descriptors(keep={control_fd})
    _default_hooks()
    return worker_main.FreshState((), frozenset(int(number) for number in mask), {})


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """A zygote that has imported everything."""

    facts: ZygoteFacts
    state: worker_main.FreshState
    compute_threads: _threads.ComputeThreads


def prepare(state: worker_main.FreshState, preload: Sequence[str], search_path: str) -> Prepared:
    """Import everything and settle. Raises `PreloadError`."""
    env, cwd = dict(os.environ), os.getcwd()
    query = subprocess.Popen([sys.executable, "-c", _STARTUP_QUERY], stdout=subprocess.PIPE)
    _import(ALWAYS_IMPORTED)
    from autoglm_elastic.agent._reverse_dns import forgo_reverse_lookups  # it imports torch

    forgo_reverse_lookups()
    output, _ = query.communicate(timeout=_STARTUP_QUERY_S)
    path, modules, *flags = ast.literal_eval(output.decode())
    path = path if sys.flags.safe_path else path[1:]
    sys.path[:] = [search_path, *path] if search_path else path
    _import(preload)
    compute_threads = _threads.ComputeThreads(env)
    # Every worker empties these caches, which dirties the pages they lie in: once here is megabytes less in each.
    linecache.clearcache()
    importlib.invalidate_caches()
    gc.collect()
    gc.freeze()
    threads = _threads.settled_threads()
    # From here on the server's loop watches the agent, and ends the workers' whole sessions with it.
    _linux.set_parent_death_signal(0)
    handlers = {
        int(number): signal.signal(number, _leave_to_the_agent)
        for number in AGENTS_SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    facts = ZygoteFacts(
        env=env,
        cwd=cwd,
        flags_differ=_given(*flags) != _given(tuple(sys.flags), sys.warnoptions, sys._xoptions),
        cuda=cuda_initialized(),
        threads=threads,
        startup_modules=frozenset(modules),
    )
    return Prepared(facts, dataclasses.replace(state, path=tuple(path), handlers=handlers), compute_threads)


def _given(flags: tuple[int, ...], *options: object) -> tuple[object, ...]:
    """But for the UTF-8 mode: an interpreter that finds no locale turns it on by itself, and hands a UTF-8 locale to
    its children, which read and write the same without. Given as an option it is among `options`."""
    return *flags[:_UTF8_MODE], *flags[_UTF8_MODE + 1 :], *options


def cuda_initialized() -> bool:
    """Whether a worker forked from here could not use CUDA: asked of the driver, if it is loaded at all."""
    torch: Any = sys.modules["torch"]
    if torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork():
        return True
    with open("/proc/self/maps") as maps:
        if "libcuda.so" not in maps.read():
            return False
    count = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(count))
    return int(status) != _CUDA_NOT_INITIALIZED


def _leave_to_the_agent(number: int, frame: types.FrameType | None) -> None:
    """In place of SIG_IGN, which a worker that is executed would inherit."""


def _import(names: Sequence[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise PreloadError(f"{name}: {type(error).__name__}: {error}") from error


def _default_signals(ignored: set[signal.Signals]) -> None:
    """As a new interpreter sets them. Handlers that are not Python's (faulthandler's) stay."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}:
        if number in ignored or signal.getsignal(number) is None:
            continue
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, default)


def _close_descriptors(keep: set[int]) -> None:
    """The agent's sockets and files; 0 becomes empty, 1 and 2 stay the agent's."""
    for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):
                os.close(fd)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for fd in (1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.dup2(null, fd)
    if null > 2:
        os.close(null)


def _default_hooks() -> None:
    sys.excepthook, sys.displayhook = sys.__excepthook__, sys.__displayhook__
    sys.unraisablehook, sys.breakpointhook = sys.__unraisablehook__, sys.__breakpointhook__
    threading.excepthook = threading.__excepthook__
    sys.settrace(None)
    sys.setprofile(None)
    for handler in list(logging.root.handlers):
        logging.root.removeHandler(handler)
    logging.root.setLevel(logging.WARNING)
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    if tracker is not None:
        # A helper of the launcher's, whose descriptor has just been closed.
        tracker._resource_tracker._fd = tracker._resource_tracker._pid = None
