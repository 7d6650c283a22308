"""Blobs on a local (or POSIX) file system.

A blob becomes visible only whole and durable: temporary name, fsync, link or rename, fsync of the directory.
Reading follows no symbolic link below the root and never leaves it. After a failed fsync the file is
abandoned, since the kernel may have marked its lost pages clean (`SyncFailed`: write the data anew under
another name).

This room knows nothing of snapshots; it must never overwrite a blob in place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from typing import Final

from autoglm_elastic.errors import CorruptSnapshot, ElasticError, PlatformError, UsageError
from autoglm_elastic.ports import Outcome
from autoglm_elastic.storage._direct import buffered, direct_nbytes
from autoglm_elastic.storage._local_read import LocalReader, platform_error
from autoglm_elastic.storage._names import NAME_PARTS_MAX, checked_name, is_part
from autoglm_elastic.storage.files import Files

TEMPORARY_DIR: Final = "tmp"
WRITE_BYTES: Final = 16 << 20
"""One write call; large enough to be sequential on every disk, small enough to notice an error early."""
SYNC_ATTEMPTS: Final = 2
"""How often a small blob is written anew under another name after a failed fsync."""

_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_DIR_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY


class SyncFailed(PlatformError):
    """fsync failed: what was written may be lost although later calls succeed. Write it anew elsewhere."""


class LocalPending:
    """A file under a temporary name (ports.PendingBlob)."""

    def __init__(self, blobs: LocalBlobs, head: int = 0) -> None:
        self._blobs = blobs
        self._files = blobs.files
        self._head = head
        self._at = head
        self._is_direct = False
        self.path = blobs.temporary_path()
        try:
            self._fd = self._files.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        except OSError as error:
            raise platform_error(error, "creating", self.path) from error

    def write(self, view: memoryview | bytes) -> None:
        data = memoryview(view).cast("B")
        past_cache = direct_nbytes(data, self._at) if self._blobs.direct else 0
        try:
            self._write(data[:past_cache], direct=True)
            self._write(data[past_cache:], direct=False)
        except OSError as error:
            self.discard()
            raise platform_error(error, "writing", self.path) from error

    def _write(self, data: memoryview, *, direct: bool) -> None:
        """Raises OSError."""
        done = 0
        while done < data.nbytes:
            try:
                if direct is not self._is_direct:
                    self._files.set_direct(self._fd, direct)
                    self._is_direct = direct
                rest = data[done : done + WRITE_BYTES]
                count = self._files.write(self._fd, buffered(rest) if direct else rest, self._at)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                self._blobs.direct = direct = False  # this file system cannot, or wants larger blocks
                continue
            done += count
            self._at += count

    def sync(self) -> None:
        """Data durable, file closed. Raises SyncFailed; the file is gone then."""
        try:
            self._files.fsync(self._fd)
        except OSError as error:
            self.discard()
            raise SyncFailed(*platform_error(error, "fsync of", self.path).args) from error
        fd, self._fd = self._fd, -1
        try:
            self._files.close(fd)
        except OSError as error:  # a network file system may tell of a lost write only now
            self.discard()
            raise SyncFailed(*platform_error(error, "closing", self.path).args) from error

    def publish(self, name: str, head: bytes = b"") -> None:
        if len(head) != self._head:
            raise UsageError(f"a head of {len(head)} bytes", valid=f"{self._head}, as announced")
        target = self._blobs.path(name)
        self._at = 0
        self.write(head)
        self.sync()
        try:
            self._blobs.ensure_parent(name)
            self._files.rename(self.path, target)
            self._files.fsync_directory(os.path.dirname(target))
        except OSError as error:
            self.discard()
            raise platform_error(error, "publishing", target) from error

    def discard(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                self._files.close(fd)
        self._blobs.forget(self.path)


class LocalBlobs:
    """ports.StreamBlobs under the directory `root`, which is made when something is written.

    Args:
        root: the directory; may itself be reached through symbolic links.
        files: the system calls, for tests.
        direct: large writes go past the page cache where the file system can.
    """

    remote = False

    def __init__(
        self, root: str | os.PathLike[str], *, files: Files | None = None, direct: bool = False
    ) -> None:
        self.root = os.path.abspath(os.fspath(root))
        self.files = files or Files()
        self.direct = direct
        self._durable_dirs: set[str] = set()

    def path(self, name: str) -> str:
        return os.path.join(self.root, *checked_name(name))

    def temporary_path(self) -> str:
        try:
            self._ensure_dir(os.path.join(self.root, TEMPORARY_DIR))
        except OSError as error:
            raise platform_error(error, "making", os.path.join(self.root, TEMPORARY_DIR)) from error
        return os.path.join(self.root, TEMPORARY_DIR, f"{os.getpid()}-{secrets.token_hex(8)}")

    def forget(self, path: str) -> None:
        """Removes a temporary file if it is there; a left-over is swept by garbage collection."""
        with contextlib.suppress(OSError):
            self.files.unlink(path)

    def ensure_parent(self, name: str) -> None:
        self._ensure_dir(os.path.dirname(self.path(name)))

    def _ensure_dir(self, path: str) -> None:
        """The directory exists and so, durably, does its name up to the root. Raises OSError."""
        if path in self._durable_dirs and os.path.isdir(path):  # somebody may have begun afresh
            return
        parent = os.path.dirname(path)
        if path == self.root:
            os.makedirs(parent, exist_ok=True)
        else:
            self._ensure_dir(parent)
        try:
            self.files.mkdir(path)
        except FileExistsError:
            mode = os.stat(path).st_mode if path == self.root else os.lstat(path).st_mode
            if not stat.S_ISDIR(mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        self.files.fsync_directory(parent)
        self._durable_dirs.add(path)

    def _open(self, name: str, flags: int) -> int:
        """Walks down with O_NOFOLLOW, so that no link below the root is followed. Raises OSError."""
        parts = checked_name(name)
        directory = self.files.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                deeper = self.files.open(part, _DIR_FLAGS, dir_fd=directory)
                directory, done = deeper, directory
                with contextlib.suppress(OSError):
                    self.files.close(done)
            return self.files.open(parts[-1], flags, dir_fd=directory)
        finally:
            with contextlib.suppress(OSError):
                self.files.close(directory)

    def open(self, name: str) -> LocalReader:
        path = self.path(name)
        try:
            fd = self._open(name, _READ_FLAGS)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise CorruptSnapshot(f"{path} is no plain file, or lies behind a symbolic link") from error
            raise platform_error(error, "opening", path) from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            self.files.close(fd)
            raise CorruptSnapshot(f"{path} is no plain file")
        return LocalReader(self.files, fd, name, path, status.st_size)

    def read(self, name: str, *, bytes_max: int) -> bytes:
        reader = self.open(name)
        try:
            if reader.nbytes > bytes_max:
                raise CorruptSnapshot(
                    f"{self.path(name)} has {reader.nbytes} bytes", valid=f"at most {bytes_max}"
                )
            data = bytearray(reader.nbytes)
            reader.read_into(0, memoryview(data))
            return bytes(data)
        finally:
            reader.close()

    def read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        reader = self.open(name)
        try:
            if offset < 0 or nbytes < 0 or offset + nbytes > reader.nbytes:
                raise CorruptSnapshot(
                    f"{self.path(name)} has {reader.nbytes} bytes, but {nbytes} from {offset} are wanted"
                )
            data = bytearray(nbytes)
            reader.read_into(offset, memoryview(data))
            return bytes(data)
        finally:
            reader.close()

    def size(self, name: str) -> int:
        reader = self.open(name)
        reader.close()
        return reader.nbytes

    def _synced(self, data: bytes) -> LocalPending:
        for attempt in range(1, SYNC_ATTEMPTS + 1):
            pending = LocalPending(self)
            pending.write(data)
            try:
                pending.sync()
                return pending
            except SyncFailed:
                if attempt == SYNC_ATTEMPTS:
                    raise
        raise ElasticError("no attempt was made to write a blob")

    def create(self, *, head: int = 0) -> LocalPending:
        return LocalPending(self, head)

    def put_if_absent(self, name: str, data: bytes) -> Outcome:
        """OK, or CONFLICT (the name is durable then, too), or UNKNOWN when it may be there but not durably: read to
        settle it."""
        target = self.path(name)
        pending = self._synced(data)
        try:
            self.ensure_parent(name)
            self.files.link(pending.path, target)
            outcome = Outcome.OK
        except FileExistsError:
            outcome = Outcome.CONFLICT
        except OSError as error:
            if error.errno == errno.EIO:
                return Outcome.UNKNOWN
            raise platform_error(error, "creating", target) from error
        finally:
            pending.discard()
        try:  # also what somebody else has put: he may not have come to it yet
            self.files.fsync_directory(os.path.dirname(target))
        except OSError:
            return Outcome.UNKNOWN
        return outcome

    def replace(self, name: str, data: bytes) -> None:
        target = self.path(name)
        pending = self._synced(data)
        try:
            self.ensure_parent(name)
            self.files.rename(pending.path, target)
            self.files.fsync_directory(os.path.dirname(target))
        except OSError as error:
            pending.discard()
            raise platform_error(error, "replacing", target) from error

    def point(self, name: str, target: str) -> None:
        path = self.path(name)
        temporary = self.temporary_path()
        try:
            self.ensure_parent(name)
            self.files.symlink(target, temporary)
            self.files.rename(temporary, path)
        except OSError as error:
            self.forget(temporary)
            raise platform_error(error, "linking", path) from error

    def delete(self, name: str) -> None:
        path = self.path(name)
        try:
            self.files.unlink(path)
            self.files.fsync_directory(os.path.dirname(path))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise platform_error(error, "removing", path) from error

    def ages(self, prefix: str) -> dict[str, float]:
        """By the clock of the file system: a file that is made now is the measure."""
        now = self.now()
        return {name: now - status.st_mtime for name, status in self._statuses(prefix)}

    def stamps(self, prefix: str) -> dict[str, str]:
        return {
            name: f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
            for name, status in self._statuses(prefix)
        }

    def _statuses(self, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
        for name in self.list(prefix):
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(self.path(name))
                if stat.S_ISREG(status.st_mode):
                    yield name, status

    def now(self) -> float:
        """The time that the file system gives a new file."""
        path = self.temporary_path()
        try:
            fd = self.files.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
            try:
                return os.fstat(fd).st_mtime
            finally:
                self.files.close(fd)
        except OSError as error:
            raise platform_error(error, "creating", path) from error
        finally:
            self.forget(path)

    def delete_older(self, name: str, older_s: float) -> int:
        """The file is looked at again under another name, where no writer can replace it, before it is removed; one
        that was written again meanwhile gets its name back."""
        path, aside = self.path(name), self.temporary_path()
        try:
            if self.now() - os.lstat(path).st_mtime < older_s:
                return -1
            self.files.rename(path, aside)
            status = os.lstat(aside)
            young = self.now() - status.st_mtime < older_s
            if young:
                with contextlib.suppress(FileExistsError):
                    self.files.link(aside, path)
            self.files.unlink(aside)
        except FileNotFoundError:
            return -1
        except OSError as error:
            raise platform_error(error, "removing", path) from error
        return -1 if young else status.st_size

    def sweep(self, older_s: float) -> int:
        """Temporary files of killed writers. A file that is being written has just been touched."""
        folder = os.path.join(self.root, TEMPORARY_DIR)
        swept = 0
        try:
            names = os.listdir(folder)
            now = self.now()
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    status = os.lstat(path)
                    if not stat.S_ISDIR(status.st_mode) and now - status.st_mtime >= older_s:
                        self.files.unlink(path)
                        swept += 1
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise platform_error(error, "sweeping", folder) from error
        return swept

    def list(self, prefix: str) -> list[str]:
        """Plain files under the directory `prefix`, at any depth a name can have."""
        top = self.path(prefix)
        if os.path.islink(top):
            raise CorruptSnapshot(f"{top} is a symbolic link", valid="a directory")
        names: list[str] = []

        def failed(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise platform_error(error, "listing", top)

        for directory, dirs, files in os.walk(top, onerror=failed, followlinks=False):
            relative = os.path.relpath(directory, self.root).replace(os.sep, "/")
            if relative.count("/") + 2 >= NAME_PARTS_MAX:
                dirs.clear()
            names.extend(f"{relative}/{file}" for file in files if is_part(file))
        return sorted(names)
