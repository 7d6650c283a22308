"""Writing past the page cache, through a buffer of large pages.

The kernel's copy into the page cache costs several times what this copy does, in time that is taken from the
training. Straight from shared memory would cost none, but its small scattered pages make small requests, which
are slow on many disks."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from typing import Final

BUFFER_BYTES: Final = 16 << 20
"""One a writing thread."""
DIRECT_BYTES_MIN: Final = 1 << 20
"""Smaller writes are quicker through the page cache."""
BLOCK_BYTES: Final = 4096
"""Place and size of a write past the page cache are multiples of it; no disk has larger blocks."""

_of_thread = threading.local()


def direct_nbytes(data: memoryview, at: int) -> int:
    """How much of `data`, at `at` of its file, goes past the page cache: whole blocks of large writes."""
    if data.readonly or data.nbytes < DIRECT_BYTES_MIN or at % BLOCK_BYTES:
        return 0
    return data.nbytes // BLOCK_BYTES * BLOCK_BYTES


def buffered(data: memoryview) -> memoryview:
    """The beginning of writable `data`, at most BUFFER_BYTES, in this thread's buffer, valid until the next
    call."""
    buffer = getattr(_of_thread, "buffer", None)
    if buffer is None:
        buffer = mmap.mmap(-1, BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        _of_thread.buffer = buffer
    nbytes = min(data.nbytes, BUFFER_BYTES)
    target = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    ctypes.memmove(target, ctypes.addressof(ctypes.c_char.from_buffer(data)), nbytes)
    return memoryview(buffer)[:nbytes]
