"""Reading where every read is a request: what the adapters of remote stores share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from autoglm_elastic.storage._names import check_range
from autoglm_elastic.storage._parallel import REQUEST_BYTES, Threads, read_parallel, scatter


class Remote(Protocol):
    """A store that can fetch one range of a blob."""

    url: str
    threads: Threads

    def size(self, name: str) -> int: ...

    def fetch(self, name: str, offset: int, view: memoryview) -> None:
        """One range. Raises FileNotFoundError, CorruptSnapshot when the blob ends before it, PlatformError."""


class RemoteReader:
    """One blob (ports.BlobReader). Large ranges are fetched as several at once; nothing is held."""

    block = REQUEST_BYTES

    def __init__(self, store: Remote, name: str) -> None:
        self.name, self.nbytes, self._store = name, store.size(name), store

    def scatter_into(self, offset: int, views: Sequence[memoryview]) -> None:
        scatter(self.read_into, offset, views)

    def read_into(self, offset: int, view: memoryview) -> None:
        check_range(f"{self._store.url}/{self.name}", self.nbytes, offset, view.nbytes)
        fetch = self._store.fetch
        read_parallel(
            self._store.threads, lambda at, part: fetch(self.name, at, part), offset, view, self.name
        )

    def read(self, offset: int, nbytes: int) -> bytes:
        check_range(f"{self._store.url}/{self.name}", self.nbytes, offset, nbytes)
        data = bytearray(nbytes)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        """Nothing is held."""
