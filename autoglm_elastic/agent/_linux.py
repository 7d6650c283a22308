"""The few calls to the kernel and the C library for which Python has no name. Nothing here keeps state."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Sequence
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_IONBF: Final = 2

libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL this process when the thread that forked it ends; at once when that has happened already."""
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def set_parent_death_signal(sig: int) -> None:
    """0 for none. Raises OSError."""
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(sig), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def thread_count() -> int:
    """Threads of this process, those without Python too."""
    return len(os.listdir("/proc/self/task"))


def show_as(command: Sequence[str]) -> None:
    """Let `ps` show `command` for this process, as far as it fits into what the process was started with."""
    libc.prctl(_PR_SET_NAME, os.fsencode(os.path.basename(command[0]))[:15], 0, 0, 0)
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        text = b"\0".join(os.fsencode(argument) for argument in command)
        room = end - start - 1
        if start > 0 and room > 0:
            ctypes.memset(start, 0, end - start)
            ctypes.memmove(start, text[:room], min(len(text), room))


def unbuffer_c_stdio() -> None:
    """As `python -u` does for what extension modules print."""
    for name in ("stdin", "stdout", "stderr"):
        libc.setvbuf(ctypes.c_void_p.in_dll(libc, name), None, _IONBF, 0)


def flush_c_stdio() -> None:
    """What extension modules have printed so far would otherwise be written again by every fork."""
    libc.fflush(None)


def die_at_exit(sig: int) -> None:
    """Let `exit()` end this process by `sig` before it does anything else."""
    libc.__cxa_atexit(ctypes.cast(getattr(libc, "raise"), ctypes.c_void_p), ctypes.c_void_p(sig), None)
