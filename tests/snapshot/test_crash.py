"""A crash at any moment leaves the old recovery point or the new one, whole; an error at any call loses
nothing."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_elastic.catalog import limits
from autoglm_elastic.observe import events
from autoglm_elastic.snapshot import CheckpointManager, Line
from autoglm_elastic.storage import LocalBlobs
from autoglm_elastic.storage.files import Files
from tests.snapshot.disk_model import Image, Recorder, images

WAIT_S = 60.0
SEED = 7


def state(step: int) -> dict[str, Any]:
    return {"a": torch.full((40,), float(step)), "b": torch.full((30,), step), "step": step}


def whole_step(manager: CheckpointManager, entry: Any) -> int:
    """The one step that all of a snapshot's values are of."""
    loaded: dict[str, Any] = {}
    manager.load(loaded, entry=entry)
    values = {*loaded["a"].tolist(), *loaded["b"].tolist(), loaded["step"]}
    assert len(values) == 1, f"a mixture: {values}"
    return int(loaded["step"])


@pytest.fixture(autouse=True)
def several_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PACK_BYTES", 250)


def record(files: Recorder) -> list[tuple[Any, ...]]:
    """Two snapshots; what was promised to the caller is marked in the log."""
    with CheckpointManager(LocalBlobs(files.root, files=files)) as manager:
        for step in (1, 2):
            assert manager.save(step, state(step)).wait(WAIT_S).committed
            files.mark(f"committed {step}")
    return files.log


def problems(image: Image, where: Path) -> list[str]:
    image.build(where)
    found = []
    with CheckpointManager(where) as manager:
        steps = []
        for entry in manager.entries():
            wrong = manager.verify(entry)
            found += [f"visible but damaged: {problem}" for problem in wrong]
            if not wrong:
                steps.append(whole_step(manager, entry))
        found += [
            f"{fact}, but only {steps} are there" for fact in image.facts if int(fact.split()[1]) not in steps
        ]
        newest = manager.newest_verified()
        if (newest.step if newest else None) != max(steps, default=None):
            found.append("the newest that verifies is not the newest")
    return found


def crash_everywhere(
    log: list[tuple[Any, ...]], root: Path, scratch: Path, *, stop: bool = False
) -> tuple[int, list[str]]:
    """(images looked at, problems). `stop` at the first problem."""
    seen: set[Image] = set()
    found = []
    for image in images(log, str(root), SEED):
        if image not in seen:
            seen.add(image)
            found += problems(image, scratch / f"image{len(seen)}")
            if found and stop:
                break
    return len(seen), found


def test_every_crash_leaves_the_old_or_the_new_snapshot(tmp_path: Path) -> None:
    root = tmp_path / "run"
    count, found = crash_everywhere(record(Recorder(root)), root, tmp_path)
    print(f"seed {SEED}: {count} images of a crashed disk")
    assert found == []
    assert count > 10


class Lazy(Recorder):
    """Forgets one kind of fsync."""

    def __init__(self, root: Path, forgets: str) -> None:
        super().__init__(root)
        self.forgets = forgets

    def fsync(self, fd: int) -> None:
        if self.forgets != "files":
            super().fsync(fd)

    def fsync_directory(self, path: str) -> None:
        if not path.endswith(self.forgets):
            super().fsync_directory(path)


@pytest.mark.parametrize("forgets", ["files", "catalog", "manifests"])
def test_the_model_finds_a_forgotten_fsync(tmp_path: Path, forgets: str) -> None:
    root = tmp_path / "run"
    _, found = crash_everywhere(record(Lazy(root, forgets)), root, tmp_path, stop=True)
    assert found != []


class Faulty(Files):
    """The calls of a kind fail from number `first` on, `count` times; counts all calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.first, self.count, self.code = -1, 0, 0

    def fail(self, first: int, count: int, code: int) -> None:
        self.calls, self.first, self.count, self.code = 0, first, count, code

    def _tick(self) -> None:
        self.calls += 1
        if self.first <= self.calls - 1 < self.first + self.count:
            raise OSError(self.code, os.strerror(self.code))

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        self._tick()
        return super().open(path, flags, dir_fd=dir_fd)

    def write(self, fd: int, view: memoryview, offset: int) -> int:
        self._tick()
        return super().write(fd, view, offset)

    def fsync(self, fd: int) -> None:
        self._tick()
        super().fsync(fd)

    def fsync_directory(self, path: str) -> None:
        self._tick()
        super().fsync_directory(path)

    def rename(self, source: str, target: str) -> None:
        self._tick()
        super().rename(source, target)

    def link(self, source: str, target: str) -> None:
        self._tick()
        super().link(source, target)

    def symlink(self, text: str, path: str) -> None:
        self._tick()
        super().symlink(text, path)

    def unlink(self, path: str) -> None:
        self._tick()
        super().unlink(path)

    def mkdir(self, path: str) -> None:
        self._tick()
        super().mkdir(path)


@pytest.mark.parametrize("count", [1, 1 << 30], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_an_error_at_any_call_is_the_snapshots_failure_and_no_more(
    tmp_path: Path, code: int, count: int
) -> None:
    files = Faulty()
    seen: list[str] = []

    def listen(name: str, fields: dict[str, Any]) -> None:
        events.make(name, fields)
        seen.append(name)

    first = 0
    outcomes = {True: 0, False: 0}
    while True:
        where = tmp_path / str(first)
        files.fail(-1, 0, 0)
        with CheckpointManager(LocalBlobs(where, files=files), on_event=listen) as manager:
            assert manager.save(1, state(1)).wait(WAIT_S).committed
            files.fail(first, count, code)
            seen.clear()
            result = manager.save(2, state(2)).wait(WAIT_S)
            reached = files.calls > first
            files.fail(-1, 0, 0)
            outcomes[result.committed] += 1
            assert ("snapshot.committed" in seen) == result.committed
            if not result.committed:
                unsure = "not confirmed" in result.reason or "could not be read" in result.reason
                assert os.strerror(code) in result.reason or unsure
            there = {entry.step: entry for entry in manager.entries()}
            assert 1 in there
            assert (2 in there) == result.committed
            for step, entry in there.items():
                assert manager.verify(entry) == []
                assert whole_step(manager, entry) == step
            assert manager.save(3, state(3)).wait(WAIT_S).committed, "training's next snapshot is not harmed"
        if not reached:
            break
        first += 1
    print(f"{first} calls, {outcomes}")
    assert first > 20
    assert outcomes[False] > 5


def test_an_aborted_snapshot_leaves_no_bytes_behind(tmp_path: Path) -> None:
    """A disk that is full does not become fuller with every trigger."""
    files = Faulty()
    line = Line(LocalBlobs(tmp_path / "run", files=files))

    def leftovers() -> list[Path]:
        return sorted((tmp_path / "run" / "tmp").glob("*"))

    with contextlib.closing(line), CheckpointManager(line.blobs, line=line) as manager:
        before: list[Path] = []
        left: list[Path] = []
        aborted = 0
        for first in range(40):
            files.fail(first, 1, errno.ENOSPC)
            result = manager.save(first, state(first)).wait(WAIT_S)
            files.fail(-1, 0, 0)
            assert line.settle(WAIT_S)
            packs = sorted(tmp_path.rglob("*.safetensors"))
            if result.committed:  # what could not be unlinked then stays
                before, left = packs, leftovers()
            else:
                aborted += 1
                assert packs == before, result.reason
                assert leftovers() == left
        assert aborted > 5
