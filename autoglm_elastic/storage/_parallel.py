"""A few threads for the requests of one blob: ranges of a large read, parts of a large upload.

May touch: threads. It must never let a caller wait without a bound."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, Final

from autoglm_elastic.errors import PlatformError

THREADS: Final = 8
"""Requests in flight at once for large blobs, per process and file system."""
RANGE_BYTES: Final = 8 << 20
"""One range request of a large read: large against a round trip, small against a network's hiccup."""
REQUEST_BYTES: Final = 32 << 20
"""What a reader is best asked for at a time: a few ranges at once."""
LIMIT_S: Final = 3600.0
"""Bound of one blob's transfer, whatever its size; each request has its own, shorter ones."""


class Threads:
    """A pool that begins with its first task. Tasks must not submit tasks."""

    def __init__(self, threads: int = THREADS) -> None:
        self._threads, self._lock = threads, threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="autoglm-storage")
            return self._pool.submit(call, *args)


def collect(futures: list[Future[Any]], doing: str, limit_s: float = LIMIT_S) -> list[Any]:
    """The results in order. Raises the first error, when what ran has ended and what did not run is cancelled."""
    _, late = wait(futures, timeout=limit_s, return_when=FIRST_EXCEPTION)
    for future in late:
        future.cancel()
    _, hanging = wait(late, timeout=limit_s)
    if hanging:
        raise PlatformError(f"{doing} did not end within {limit_s:.0f} s", do="check the network")
    for future in futures:
        if not future.cancelled() and (error := future.exception(timeout=0)) is not None:
            raise error
    if any(future.cancelled() for future in futures):
        raise PlatformError(f"{doing} did not end within {limit_s:.0f} s", do="check the network")
    return [future.result(timeout=0) for future in futures]


def read_parallel(
    threads: Threads, fetch: Callable[[int, memoryview], None], offset: int, view: memoryview, name: str
) -> None:
    """Fills `view` from `offset` on by calls of `fetch(offset, part)`: a small one in this thread, a large one
    in pieces of RANGE_BYTES on `threads`. Returns or raises when no thread writes to `view` any more."""
    data = view.cast("B")
    if data.nbytes <= RANGE_BYTES:
        fetch(offset, data)
        return
    pieces = range(0, data.nbytes, RANGE_BYTES)
    futures = [threads.submit(fetch, offset + at, data[at : at + RANGE_BYTES]) for at in pieces]
    collect(futures, f"reading {name}")


def scatter(read_into: Callable[[int, memoryview], None], offset: int, views: Sequence[memoryview]) -> None:
    """Several buffers with consecutive bytes in one read, where a read costs a round trip."""
    if len(views) == 1:
        read_into(offset, views[0])
        return
    data = memoryview(bytearray(sum(view.nbytes for view in views)))
    read_into(offset, data)
    at = 0
    for view in views:
        view.cast("B")[:] = data[at : at + view.nbytes]
        at += view.nbytes
