"""Shared memory that no file system holds and that cannot shrink under its reader (a sealed memfd); how much of
it there may be; and two wishes to the kernel that Python has no words for.

Memory is freed when both sides have let go of it, however they ended."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
from pathlib import Path
from typing import Final

import psutil

from autoglm_elastic.errors import PlatformError

PAGE: Final = mmap.PAGESIZE
_MADV_DONTFORK: Final = 10
_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_WRITE: Final = 23
_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
_BEST_EFFORT_LOWEST: Final = (2 << 13) | 7
_AVAILABLE_SHARE_MAX: Final = 0.9
"""Of what the machine has available, one segment takes at most this much: the rest is for everybody else."""

_CGROUPS: Final = (
    (Path("/sys/fs/cgroup"), "memory.current", "memory.max", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
)
"""Folder, and the files and the row that say how much is used, allowed, and only cached; version 2 and 1."""
ADVICE: Final = "free memory, raise keeper.memory_max_bytes, or use more nodes"

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class MemoryRefused(PlatformError):
    """A segment would exceed a limit. Nothing was allocated."""


class Memory:
    """A mapped memfd. `view` is writable and page aligned."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd, self.nbytes = fd, nbytes
        self._map = mmap.mmap(fd, nbytes)
        self.view = memoryview(self._map)
        self._advise(_MADV_DONTFORK)

    @classmethod
    def create(cls, nbytes: int) -> Memory:
        """Zeroed, every page present. Raises OSError."""
        nbytes = max(PAGE, -(-nbytes // PAGE) * PAGE)
        fd = os.memfd_create("autoglm-segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = cls(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise
        memory._advise(_MADV_HUGEPAGE)
        memory.populate()
        return memory

    def populate(self) -> None:
        """Every page is present in this process' page table, so that no later access faults. Without the
        interpreter's lock; does nothing on a kernel that cannot."""
        self._advise(_MADV_POPULATE_WRITE)

    def _advise(self, advice: int) -> None:
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        _libc.madvise(start, self.nbytes, advice)

    def close(self) -> None:
        """Idempotent. The mapping goes when the last view of it does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            with contextlib.suppress(BufferError):
                self.view.release()
                self._map.close()


def refusal(nbytes: int, held: int, bytes_max: int) -> str:
    """Why a segment of `nbytes` is too much beside `held` bytes, or "". `bytes_max` 0: as the machine allows."""
    if bytes_max and held + nbytes > bytes_max:
        return f"{held} bytes are in use, keeper.memory_max_bytes is {bytes_max}"
    share = int(available() * _AVAILABLE_SHARE_MAX)
    return f"this machine has {share} bytes to spare" if nbytes > share else ""


def available() -> int:
    """Bytes that can be taken without swapping or going over this container's limit."""
    free = int(psutil.virtual_memory().available)
    for folder, used, limit, reclaimable in _CGROUPS:
        with contextlib.suppress(OSError, ValueError, KeyError):
            rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(rows[reclaimable])
            free = min(free, int((folder / limit).read_text()) - taken)
    return max(0, free)


def step_back(niceness: int) -> None:
    """This process yields to others, in computing and in writing. What the system refuses is left."""
    with contextlib.suppress(OSError):
        os.nice(niceness)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        _libc.syscall(number, 1, 0, _BEST_EFFORT_LOWEST)
