"""LocalBlobs: whole and durable or not there; never outside of its root; every error one clear line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoglm_elastic.errors import CorruptSnapshot, ElasticError, PlatformError, UsageError
from autoglm_elastic.ports import Outcome
from autoglm_elastic.storage import LocalBlobs
from autoglm_elastic.storage.files import Files


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path / "root")


def test_what_is_put_is_read(blobs: LocalBlobs) -> None:
    assert blobs.put_if_absent("a/b/c", b"123456") is Outcome.OK
    assert blobs.read("a/b/c", bytes_max=6) == b"123456"
    assert blobs.read_range("a/b/c", 2, 3) == b"345"
    assert blobs.size("a/b/c") == 6
    assert blobs.list("a") == ["a/b/c"]
    assert os.listdir(Path(blobs.root) / "tmp") == []


def test_a_second_put_is_a_conflict_and_changes_nothing(blobs: LocalBlobs) -> None:
    blobs.put_if_absent("a", b"first")
    assert blobs.put_if_absent("a", b"second") is Outcome.CONFLICT
    assert blobs.read("a", bytes_max=9) == b"first"


def test_replace_and_point(blobs: LocalBlobs) -> None:
    blobs.replace("HEAD", b"1")
    blobs.replace("HEAD", b"2")
    blobs.point("latest", "catalog/1")
    blobs.point("latest", "catalog/2")
    assert blobs.read("HEAD", bytes_max=1) == b"2"
    assert os.readlink(Path(blobs.root) / "latest") == "catalog/2"


def test_streamed_blob_is_invisible_until_published(blobs: LocalBlobs) -> None:
    pending = blobs.create()
    pending.write(b"12")
    pending.write(memoryview(b"34"))
    assert blobs.list("packs") == []
    pending.publish("packs/x")
    assert blobs.read("packs/x", bytes_max=4) == b"1234"
    other = blobs.create()
    other.write(b"gone")
    other.discard()
    other.discard()
    assert os.listdir(Path(blobs.root) / "tmp") == []


def test_reading_is_capped_and_bounded(blobs: LocalBlobs) -> None:
    blobs.put_if_absent("a", b"123456")
    with pytest.raises(ElasticError, match="6 bytes"):
        blobs.read("a", bytes_max=5)
    with pytest.raises(CorruptSnapshot, match="are wanted"):
        blobs.read_range("a", 4, 3)
    with pytest.raises(CorruptSnapshot, match="are wanted"):
        blobs.read_range("a", 0, 1 << 50)
    with pytest.raises(FileNotFoundError):
        blobs.read("b", bytes_max=5)
    assert blobs.list("nowhere") == []


@pytest.mark.parametrize(
    "name", ["../a", "a/../b", "/a", "a//b", "", ".", "a/.hidden", "a\0b", "a/b/c/d/e", "a b"]
)
def test_names_stay_below_the_root(blobs: LocalBlobs, name: str) -> None:
    for call in (
        lambda: blobs.read(name, bytes_max=1),
        lambda: blobs.put_if_absent(name, b""),
        lambda: blobs.replace(name, b""),
        lambda: blobs.delete(name),
        lambda: blobs.point(name, "x"),
    ):
        with pytest.raises(UsageError, match="blob name"):
            call()


def test_no_symbolic_link_is_followed(blobs: LocalBlobs, tmp_path: Path) -> None:
    blobs.put_if_absent("a/real", b"1")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_bytes(b"secret")
    (Path(blobs.root) / "a" / "link").symlink_to(secret / "file")
    (Path(blobs.root) / "dir").symlink_to(secret)
    for name in ("a/link", "dir/file"):
        with pytest.raises(CorruptSnapshot, match="symbolic link"):
            blobs.read(name, bytes_max=10)
    with pytest.raises(PlatformError):
        blobs.put_if_absent("dir/new", b"")
    assert os.listdir(secret) == ["file"]
    with pytest.raises(CorruptSnapshot, match="symbolic link"):
        blobs.list("dir")


def test_a_fifo_or_directory_is_no_blob(blobs: LocalBlobs) -> None:
    blobs.put_if_absent("a/real", b"1")
    os.mkfifo(Path(blobs.root) / "a" / "fifo")
    for name in ("a/fifo", "a"):
        with pytest.raises(CorruptSnapshot, match="no plain file"):
            blobs.read(name, bytes_max=10)


class FailingSync(Files):
    """The first `count` fsyncs of files fail."""

    def __init__(self, count: int) -> None:
        self.count = count

    def fsync(self, fd: int) -> None:
        self.count -= 1
        if self.count >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fsync(fd)


def test_after_a_failed_fsync_the_data_are_written_anew(tmp_path: Path) -> None:
    assert LocalBlobs(tmp_path, files=FailingSync(1)).put_if_absent("a", b"1") is Outcome.OK
    with pytest.raises(PlatformError, match="fsync"):
        LocalBlobs(tmp_path, files=FailingSync(2)).put_if_absent("b", b"1")
    assert LocalBlobs(tmp_path).list("b") == []
    assert os.listdir(tmp_path / "tmp") == []


class FailingDirectorySync(Files):
    def fsync_directory(self, path: str) -> None:
        if path.endswith("catalog"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fsync_directory(path)


def test_a_put_of_unsure_durability_is_unknown(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path, files=FailingDirectorySync())
    assert blobs.put_if_absent("catalog/1", b"1") is Outcome.UNKNOWN
    assert blobs.read("catalog/1", bytes_max=1) == b"1"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte, where we may mount one."""
    import subprocess

    where = tmp_path / "small"
    where.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where], capture_output=True, timeout=30
    )
    if mount.returncode != 0:
        pytest.skip("mounting is not permitted")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True, timeout=30)


def test_a_full_disk_is_one_clear_line_and_loses_nothing(small_disk: Path) -> None:
    blobs = LocalBlobs(small_disk)
    blobs.put_if_absent("a", b"kept")
    pending = blobs.create()
    with pytest.raises(PlatformError, match=r"No space left.*free some space"):
        pending.write(bytes(2 << 20))
    with pytest.raises(PlatformError, match="No space left"):
        blobs.put_if_absent("b", bytes(2 << 20))
    assert blobs.read("a", bytes_max=4) == b"kept"
    assert os.listdir(small_disk / "tmp") == []
    assert blobs.put_if_absent("c", b"small") is Outcome.OK
