"""EIO, ENOSPC and every other call that can fail: a snapshot through the keeper's writer, and a collection, at each."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from autoglm_elastic.core.commit import Verdict
from autoglm_elastic.errors import ElasticError
from autoglm_elastic.keeper import writer as writer_module
from autoglm_elastic.storage import LocalBlobs
from tests.keeper.saving import collect, decided, whole, written
from tests.keeper.state import Share
from tests.snapshot.disk_model import Unsynced

JOIN_S = 30.0


class Kth(Unsynced):
    """Call number `at` fails, and `count` - 1 behind it, from whatever thread they come."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls = self.at = self.count = self.code = 0
        self.failed: list[str] = []

    def fail(self, at: int, count: int, code: int) -> None:
        self.calls, self.at, self.count, self.code = 0, at, count, code
        self.failed = []

    def _tick(self, call: str) -> None:
        with self._lock:
            self.calls += 1
            if self.at < self.calls <= self.at + self.count:
                self.failed.append(call)
                raise OSError(self.code, os.strerror(self.code))

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        self._tick("open")
        return super().open(path, flags, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        super().close(fd)
        self._tick("close")

    def write(self, fd: int, view: memoryview, offset: int) -> int:
        self._tick("write")
        return super().write(fd, view, offset)

    def read_into(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        self._tick("read")
        return super().read_into(fd, views, offset)

    def fsync(self, fd: int) -> None:
        self._tick("fsync")

    def fsync_directory(self, path: str) -> None:
        self._tick("fsync_directory")
        super().fsync_directory(path)

    def rename(self, source: str, target: str) -> None:
        self._tick("rename")
        super().rename(source, target)

    def link(self, source: str, target: str) -> None:
        self._tick("link")
        super().link(source, target)

    def symlink(self, text: str, path: str) -> None:
        self._tick("symlink")
        super().symlink(text, path)

    def unlink(self, path: str) -> None:
        self._tick("unlink")
        super().unlink(path)

    def mkdir(self, path: str) -> None:
        self._tick("mkdir")
        super().mkdir(path)


def share() -> Share:
    return Share(tensors=3, elements=48)


def save(blobs: LocalBlobs, step: int) -> tuple[Verdict, str]:
    result = written(blobs, share(), step)
    return (Verdict.ABORT, result.reason) if result.reason else decided(blobs, share(), step, result)


def settled() -> tuple[set[str], list[str]]:
    """(descriptors, threads of ours), when the threads that end have ended."""
    ours = [one for one in threading.enumerate() if one.name.startswith("autoglm-")]
    for thread in ours:
        thread.join(JOIN_S)
    return set(os.listdir("/proc/self/fd")), [thread.name for thread in ours if thread.is_alive()]


@pytest.mark.parametrize("count", [1, 1 << 30], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_a_snapshot_survives_an_error_at_any_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, count: int
) -> None:
    monkeypatch.setattr(writer_module, "WRITE_BYTES", 96)
    outcomes: dict[str, int] = {}
    kinds: set[str] = set()
    at = 0
    while True:
        root = tmp_path / str(at)
        files = Kth()
        blobs = LocalBlobs(root, files=files)
        assert save(blobs, 1)[0] is Verdict.COMMIT
        before = settled()
        files.fail(at, count, code)
        verdict, reason = save(blobs, 2)
        reached, failed = files.calls > at, list(files.failed)
        files.fail(0, 0, 0)
        kinds.update(failed)
        outcomes[verdict.value] = outcomes.get(verdict.value, 0) + 1
        where = f"call {at} ({failed[:1]}): {verdict.value} {reason}"
        assert settled() == before, where
        assert "\n" not in reason, where
        unsure = "not confirmed" in reason or "could not be read" in reason
        assert verdict is Verdict.COMMIT or os.strerror(code) in reason or unsure, where
        steps, wrong = whole(root)
        assert wrong == [], where
        assert 1 in steps, where
        assert (2 in steps) == (verdict is Verdict.COMMIT) or verdict is Verdict.UNKNOWN, where
        if "unlink" not in failed:
            assert list((root / "tmp").iterdir()) == [], where
        assert save(blobs, 3) == (Verdict.COMMIT, ""), where
        if not reached:
            break
        at += 1
    print(f"{at} calls, {outcomes}, {sorted(kinds)}")
    assert at > 60
    assert outcomes["abort"] > 20
    assert kinds >= {"open", "close", "write", "fsync", "fsync_directory", "rename", "link", "unlink"}


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_a_collection_survives_an_error_at_any_call(tmp_path: Path, code: int) -> None:
    at = errors = 0
    while True:
        root = tmp_path / str(at)
        files = Kth()
        blobs = LocalBlobs(root, files=files)
        for step in (1, 2):
            assert save(blobs, step)[0] is Verdict.COMMIT
        before = settled()
        files.fail(at, 1, code)
        reason = ""
        try:
            collect(blobs)
        except ElasticError as error:
            reason = str(error)
            errors += 1
        assert not reason or os.strerror(code) in reason
        reached = files.calls > at
        files.fail(0, 0, 0)
        assert settled() == before
        steps, wrong = whole(root)
        assert wrong == []
        assert 2 in steps
        collect(blobs)
        assert whole(root) == ([2], [])
        if not reached:
            break
        at += 1
    print(f"{at} calls, {errors} errors")
    assert at > 40
    assert errors > 20
