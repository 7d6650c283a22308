"""Blobs on any file system that fsspec knows, within what it can promise.

fsspec has no common promise of put-if-absent: most file systems look and then write, so that two writers can both
win. Such a one is read but never written. `memory://` is written, under a lock of this process.

This room knows nothing of snapshots."""

from __future__ import annotations

import builtins
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Final

from autoglm_elastic.errors import CorruptSnapshot, PlatformError, UsageError
from autoglm_elastic.ports import Outcome
from autoglm_elastic.storage._names import blob_names, checked_name
from autoglm_elastic.storage._parallel import Threads
from autoglm_elastic.storage._remote import RemoteReader

CALL_S: Final = 120.0
"""Bound of one call: fsspec's file systems bound theirs differently, or not at all."""
WRITABLE: Final = ("memory",)

_memory = threading.Lock()
"""fsspec's memory is one per process, so is the lock that makes put-if-absent out of looking and writing."""


class FsspecPending:
    """A blob that waits in memory until it is published (ports.PendingBlob)."""

    def __init__(self, blobs: FsspecBlobs, head: int) -> None:
        self._blobs, self._head, self._data = blobs, head, bytearray()

    def write(self, view: memoryview | bytes) -> None:
        self._data += memoryview(view).cast("B")

    def publish(self, name: str, head: bytes = b"") -> None:
        if len(head) != self._head:
            raise UsageError(f"a head of {len(head)} bytes", valid=f"{self._head}, as announced")
        self._blobs.replace(name, head + self._data)
        self._data = bytearray()

    def discard(self) -> None:
        self._data = bytearray()


class FsspecBlobs:
    """ports.StreamBlobs under `url`, of fsspec's protocol `protocol`.

    Args:
        url: protocol://… without a slash at its end.
        options: the file system's own (`fsspec.filesystem(protocol, **options)`).
    """

    def __init__(self, protocol: str, url: str, options: Mapping[str, str]) -> None:
        try:
            import fsspec

            kind = fsspec.get_filesystem_class(protocol)
            self._fs = kind(**options, skip_instance_cache=True, use_listings_cache=False)
            root = str(self._fs._strip_protocol(url)).rstrip("/")
            self._base = f"{root}/" if root else ""
        except ImportError as error:
            raise UsageError(
                f"{protocol}:// needs a package that is not installed ({error})", do="pip install it"
            ) from error
        except (ValueError, TypeError, OSError) as error:
            raise UsageError(f"{url}: {_one_line(error)}", valid="a URL that fsspec knows") from error
        self.protocol, self.url = protocol, url
        self.remote = protocol != "memory"
        self.threads = Threads()
        self._calls = Threads()

    def _path(self, name: str) -> str:
        checked_name(name)
        return f"{self._base}{name}"

    def _call(self, doing: str, name: str, call: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """`call`, bounded. Raises FileNotFoundError or PlatformError: whatever a file system raises is one."""
        try:
            return self._calls.submit(lambda: call(*args, **keywords)).result(timeout=CALL_S)
        except FileNotFoundError:
            raise
        except FutureTimeout as error:
            raise PlatformError(
                f"{doing} {self.url}/{name} did not end within {CALL_S:.0f} s", do="check the network"
            ) from error
        except Exception as error:
            raise PlatformError(f"{doing} {self.url}/{name}: {_one_line(error)}") from error

    # Reading.

    def size(self, name: str) -> int:
        info = self._call("looking at", name, self._fs.info, self._path(name))
        if info.get("type") != "file":
            raise CorruptSnapshot(f"{self.url}/{name} is no plain file")
        return int(info["size"])

    def open(self, name: str) -> RemoteReader:
        return RemoteReader(self, name)

    def read(self, name: str, *, bytes_max: int) -> bytes:
        reader = self.open(name)
        if reader.nbytes > bytes_max:
            raise CorruptSnapshot(
                f"{self.url}/{name} has {reader.nbytes} bytes", valid=f"at most {bytes_max}"
            )
        return reader.read(0, reader.nbytes)

    def read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        return self.open(name).read(offset, nbytes)

    def fetch(self, name: str, offset: int, view: memoryview) -> None:
        """One range. Raises FileNotFoundError, CorruptSnapshot when the file ends before it, PlatformError."""
        if not view.nbytes:
            return
        data = self._call(
            "reading", name, self._fs.cat_file, self._path(name), start=offset, end=offset + view.nbytes
        )
        if len(data) != view.nbytes:
            raise CorruptSnapshot(f"{self.url}/{name} became shorter while it was read")
        view[:] = data

    def list(self, prefix: str) -> builtins.list[str]:
        top = self._path(prefix)
        try:
            paths = self._call("listing", prefix, self._fs.find, top)
        except FileNotFoundError:
            return []
        return blob_names(str(path).removeprefix(self._base) for path in paths)

    # Writing.

    def check_writable(self) -> None:
        """Raises PlatformError for a file system that is not known to have put-if-absent."""
        if self.protocol not in WRITABLE:
            raise PlatformError(
                f"{self.url}: {self.protocol}:// can be read, but is not known to create a name only if it is absent",
                valid="a directory or s3://bucket/prefix to write to (docs/storage.md)",
            )

    def put_if_absent(self, name: str, data: bytes) -> Outcome:
        self.check_writable()
        path = self._path(name)
        with _memory:
            if self._call("creating", name, self._fs.exists, path):
                return Outcome.CONFLICT
            self._call("creating", name, self._fs.pipe_file, path, bytes(data))
        return Outcome.OK

    def replace(self, name: str, data: bytes) -> None:
        self.check_writable()
        path = self._path(name)
        with _memory:
            self._call("replacing", name, self._fs.pipe_file, path, bytes(data))

    def create(self, *, head: int = 0) -> FsspecPending:
        self.check_writable()
        return FsspecPending(self, head)

    def point(self, name: str, target: str) -> None:
        """Nothing: there are no links."""
        checked_name(name)

    def delete(self, name: str) -> None:
        self.check_writable()
        try:
            self._call("removing", name, self._fs.rm_file, self._path(name))
        except FileNotFoundError:
            return


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
