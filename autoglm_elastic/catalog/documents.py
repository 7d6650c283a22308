"""The small documents of one folder, each read once as long as it stays the same.

What there is a listing decides, every time. Where the storage tells stamps (ports.AgingBlobs), what was decoded is kept
by name and stamp, so that a document that was removed and written again under its name is read again. What is new is
read by several threads where that takes long: on an object store each is a round trip."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Final, Generic, TypeVar

from autoglm_elastic.catalog import limits
from autoglm_elastic.errors import CorruptSnapshot
from autoglm_elastic.ports import AgingBlobs, StreamBlobs

THREADS: Final = 16
"""Reads in flight, where each takes long."""
FEW: Final = 8
"""Read one after the other first, to see how long that takes."""
LONG_S: Final = 0.002
"""A local file takes a twentieth of it, a round trip several times as much."""
READ_S: Final = 3600.0
"""Bound of all; each request has its own, shorter one."""

T = TypeVar("T")


class Documents(Generic[T]):
    """Thread safe.

    Args:
        parse: (bytes, path) → document. Raises CorruptSnapshot.
    """

    def __init__(self, blobs: StreamBlobs, parse: Callable[[bytes, str], T]) -> None:
        self._blobs, self._parse = blobs, parse
        self._lock = threading.Lock()
        self._known: dict[str, tuple[str, T | CorruptSnapshot]] = {}

    def read(self, path: str) -> T | CorruptSnapshot | None:
        """As it is now; None when it is not there."""
        try:
            return self._parse(self._blobs.read(path, bytes_max=limits.ENTRY_BYTES_MAX), path)
        except FileNotFoundError:
            return None
        except CorruptSnapshot as error:
            return error

    def stamps(self, folder: str) -> dict[str, str]:
        """Path → stamp, of what lies there; "" where the storage tells none."""
        if isinstance(self._blobs, AgingBlobs):
            return self._blobs.stamps(folder)
        return dict.fromkeys(self._blobs.list(folder), "")

    def all(self, wanted: Mapping[str, str]) -> dict[str, T | CorruptSnapshot]:
        """The documents by path, in the order of `wanted` (path → stamp, as `stamps` told); without those that are not
        there any more. What is not wanted is forgotten."""
        with self._lock:
            known = {path: self._known[path] for path in wanted.keys() & self._known.keys()}
        found = {path: document for path, (stamp, document) in known.items() if stamp == wanted[path] != ""}
        found |= self._read_all([path for path in wanted if path not in found])
        kept = {path: (wanted[path], document) for path, document in found.items() if wanted[path]}
        with self._lock:
            self._known = dict(list(kept.items())[-limits.ENTRIES_KEPT_MAX :])
        return {path: found[path] for path in wanted if path in found}

    def _read_all(self, paths: list[str]) -> dict[str, T | CorruptSnapshot]:
        began = monotonic()
        documents = [self.read(path) for path in paths[:FEW]]
        rest = paths[FEW:]
        if monotonic() - began < FEW * LONG_S:
            documents += map(self.read, rest)
        else:
            with ThreadPoolExecutor(THREADS, thread_name_prefix="autoglm-documents") as pool:
                documents += pool.map(self.read, rest, timeout=READ_S)
        return {
            path: document for path, document in zip(paths, documents, strict=True) if document is not None
        }
