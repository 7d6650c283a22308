"""Garbage collection: what goes, what never goes, and that a crash or somebody at work at the same time changes
nothing about it. Real processes, real kills."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import prepared
from autoglm_elastic.catalog.collect import POINTS, Collected, Collector
from autoglm_elastic.catalog.housekeeping import aging
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.tags import Tags
from autoglm_elastic.catalog.verify import verify
from autoglm_elastic.core.commit import Snapshot
from autoglm_elastic.core.retention import Retention
from autoglm_elastic.errors import PlatformError
from autoglm_elastic.snapshot import CheckpointManager
from autoglm_elastic.storage import LocalBlobs
from autoglm_elastic.storage.files import Files

from .collecting import LEAVES_ONE
from .saved import WAIT_S, load, names, record, save, state

HERE = Path(__file__).parent
LONG_S = 1000.0


def collect(
    run_dir: Path, policy: Retention | None = LEAVES_ONE, grace_s: float = LONG_S, **options: Any
) -> Collected:
    blobs = LocalBlobs(run_dir)
    return Collector(blobs, policy, grace_s=grace_s, age_s=grace_s, wall=time.time).run(**options)


def age(run_dir: Path, *folders: str) -> None:
    """As if everything in these folders had been written yesterday."""
    for folder in folders:
        for path in (run_dir / folder).rglob("*"):
            if path.is_file():
                os.utime(path, (path.stat().st_mtime - 2 * LONG_S,) * 2)


def age_all(run_dir: Path) -> None:
    age(run_dir, "packs", "manifests", "retired", "tmp")


def files(run_dir: Path, *folders: str) -> list[str]:
    every = folders or ("catalog", "manifests", "packs", "retired", "tmp")
    return sorted(
        str(path.relative_to(run_dir))
        for one in every
        for path in (run_dir / one).rglob("*")
        if path.is_file()
    )


def whole(run_dir: Path) -> list[str]:
    """The entries, of which every byte must verify."""
    blobs = LocalBlobs(run_dir)
    catalog = Catalog(blobs)
    for entry in catalog.entries():
        assert verify(blobs, catalog, entry) == []
    return names(run_dir)


def tag(run_dir: Path, name: str, entry: str) -> None:
    blobs = LocalBlobs(run_dir)
    Tags(blobs).put(name, entry, Catalog(blobs), time.time)


def test_an_entry_goes_at_once_its_packs_after_the_grace(run_dir: Path) -> None:
    one, two, three = save(run_dir, 1, 2, 3)
    tag(run_dir, "keep", two)
    age_all(run_dir)
    with CheckpointManager(run_dir) as reader:
        entry = reader.entries()[0]
        done = collect(run_dir)
        assert (done.retired, done.packs, done.waiting) == ([one], 0, [one])
        assert whole(run_dir) == [two, three]
        target = {"model": {}, "lr": None, "step": None}
        reader.load(target, entry=entry)  # began before, ends after
        assert target["step"] == 1
    assert collect(run_dir).packs == 0
    age(run_dir, "retired")
    done = collect(run_dir)
    assert (done.packs, done.manifests, done.waiting, done.retired) == (1, 1, [], [])
    assert done.nbytes > 4096
    assert whole(run_dir) == [two, three]
    assert files(run_dir, "retired", "tmp") == []
    assert len(files(run_dir, "packs", "manifests")) == 4


def test_a_dry_run_tells_and_changes_nothing(run_dir: Path) -> None:
    save(run_dir, 1, 2)
    age_all(run_dir)
    before = files(run_dir)
    done = collect(run_dir, dry_run=True)
    assert (done.retired, done.kept) == (["000000000001-g0"], {"000000000002-g0": "HEAD"})
    assert files(run_dir) == before


def test_without_a_policy_only_garbage_goes(run_dir: Path) -> None:
    save(run_dir, 1, 2)
    (run_dir / "tmp" / "123-abc").write_bytes(b"of a killed writer")
    for folder, name in (("packs/ab", "ab" * 32 + ".safetensors"), ("manifests", "cd" * 32 + ".json")):
        (run_dir / folder).mkdir(parents=True, exist_ok=True)
        (run_dir / folder / name).write_bytes(b"never committed")
    assert collect(run_dir, None).packs == 0, "it may be a prepare in progress"
    age_all(run_dir)
    done = collect(run_dir, None)
    assert (done.packs, done.manifests, done.leftovers, done.retired) == (1, 1, 1, [])
    assert whole(run_dir) == ["000000000001-g0", "000000000002-g0"]


def prepare(run_dir: Path, step: int, *packs: fmt.Pack) -> None:
    """As a keeper leaves it when its workers died: one of two ranks is prepared."""
    vote = fmt.Prepared(packs=packs, structure="0" * 64, cover=0)
    details = prepared.Details(structure=fmt.Structure(tensors={}, tree=None))
    prepared.put(LocalBlobs(run_dir), Snapshot(step, 0), 0, 2, vote, details)


def test_a_prepare_that_can_still_be_decided_keeps_its_packs(run_dir: Path) -> None:
    save(run_dir, 1)
    path = run_dir / "packs" / "ab" / ("ab" * 32 + ".safetensors")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x" * 16)
    age_all(run_dir)
    prepare(run_dir, 2, fmt.Pack("ab" * 32, 16, 9, 0))
    assert collect(run_dir).packs == 0
    save(run_dir, 3)
    assert (collect(run_dir).leftovers, files(run_dir, "prepared")) == (1, [])
    assert collect(run_dir).packs == 1
    assert not path.exists()


def test_what_is_fenced_is_kept_while_it_is_young(run_dir: Path) -> None:
    save(run_dir, 1, 5, generation=1)
    record(run_dir, 1)
    record(run_dir, 2, parent=1, step=1)
    (new,) = save(run_dir, 2, generation=2)
    assert collect(run_dir, Retention(keep_last=1)).retired == ["000000000001-g1"]
    assert collect(run_dir, Retention(keep_last=1, keep_abandoned_hours=0)).retired == ["000000000005-g1"]
    assert whole(run_dir) == [new]


def test_where_the_newest_generation_began_is_kept(run_dir: Path) -> None:
    """A later start would otherwise have nothing to fall back on while the generation has no snapshot of its own."""
    one, _ = save(run_dir, 1, 2, generation=1)
    record(run_dir, 1)
    record(run_dir, 2, parent=1, step=1, entry=one)
    assert collect(run_dir).retired == ["000000000002-g1"]


def test_a_tag_that_wins_the_race_brings_the_snapshot_back(run_dir: Path) -> None:
    one, two = save(run_dir, 1, 2)
    age_all(run_dir)
    path = run_dir / "tags" / "late.json"
    tag(run_dir, "late", one)
    aside = path.read_bytes()
    path.unlink()
    collect(run_dir)
    assert names(run_dir) == [two]
    path.write_bytes(aside)  # it was put while the entry went
    assert collect(run_dir).restored == [one]
    assert whole(run_dir) == [one, two]
    assert files(run_dir, "retired") == []


@pytest.mark.parametrize("folder", ["catalog", "manifests"])
def test_nothing_is_removed_while_something_cannot_be_read(run_dir: Path, folder: str) -> None:
    save(run_dir, 1, 2, 3)
    age_all(run_dir)
    (run_dir / "packs" / "ab").mkdir(exist_ok=True)
    (run_dir / "packs" / "ab" / ("ab" * 32 + ".safetensors")).write_bytes(b"garbage")
    age(run_dir, "packs")
    damaged = sorted((run_dir / folder).iterdir())[-1]
    damaged.write_bytes(damaged.read_bytes()[:-2])
    before = files(run_dir, "packs", "manifests")
    assert damaged.name in collect(run_dir, None).blocked
    assert files(run_dir, "packs", "manifests") == before


def test_a_storage_without_ages_is_refused() -> None:
    with pytest.raises(PlatformError, match="does not tell how old"):
        aging(object())  # type: ignore[arg-type]


def killed_collecting(run_dir: Path, kill_at: int) -> int:
    command = [sys.executable, HERE / "collecting.py", run_dir, str(kill_at), "1", str(LONG_S)]
    return subprocess.run(command, timeout=60, capture_output=True).returncode


@pytest.fixture(scope="module")
def due(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something to do for every effect: entries to give up, expired ones, garbage, one to bring back."""
    run_dir = tmp_path_factory.mktemp("due") / "run"
    back, gone, *_ = save(run_dir, 1, 2, 3)
    age_all(run_dir)
    tag(run_dir, "back", back)
    aside = (run_dir / "tags" / "back.json").read_bytes()
    (run_dir / "tags" / "back.json").unlink()
    assert collect(run_dir).retired == [back, gone]
    save(run_dir, 4, 5)
    age_all(run_dir)
    prepare(run_dir, 4)
    (run_dir / "tags" / "back.json").write_bytes(aside)
    return run_dir


def test_killed_at_every_effect_it_leaves_every_snapshot_whole(due: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    shutil.copytree(due, tmp_path / "count")
    blobs = LocalBlobs(tmp_path / "count")
    Collector(blobs, LEAVES_ONE, grace_s=LONG_S, age_s=LONG_S, wall=time.time, failpoint=seen.append).run()
    end = files(tmp_path / "count", "catalog", "packs", "manifests")
    assert set(seen) == set(POINTS)
    for number in range(1, len(seen) + 1):
        run_dir = tmp_path / str(number)
        shutil.copytree(due, run_dir)
        assert killed_collecting(run_dir, number) == -signal.SIGKILL
        assert set(whole(run_dir)) >= {"000000000005-g0"}
        collect(run_dir)
        assert whole(run_dir) == ["000000000001-g0", "000000000005-g0"], seen[number - 1]
        age(run_dir, "retired")
        collect(run_dir)
        assert whole(run_dir) == ["000000000001-g0", "000000000005-g0"]
        assert files(run_dir, "retired", "tmp") == []
        assert set(files(run_dir, "packs", "manifests")) <= set(end)


@pytest.mark.long
def test_saving_and_loading_go_on_while_two_collect(run_dir: Path) -> None:
    """Among the garbage are packs with the very contents that are being saved again."""
    with CheckpointManager(run_dir) as manager:
        for step in range(12):
            assert manager.save(step, {"a": torch.full((2000,), float(step % 5))}).wait(WAIT_S).committed
    collect(run_dir)
    for name in names(run_dir)[:-1]:
        (run_dir / "catalog" / f"{name}.json").unlink()
    age_all(run_dir)
    others = [
        [sys.executable, HERE / "busy.py", "save", run_dir, "30"],
        [sys.executable, HERE / "busy.py", "load", run_dir, "30"],
    ]
    working = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in others]
    # The grace is far longer than this test: only what is aged above goes, and entries as they are given up.
    collecting = [
        subprocess.Popen([sys.executable, HERE / "collecting.py", run_dir, "-", "60", "600"])
        for _ in range(2)
    ]
    for process in working:
        _, problem = process.communicate(timeout=100)
        assert process.returncode == 0, problem
    for process in collecting:
        assert process.wait(timeout=100) == 0
    assert "000000000041-g0" in whole(run_dir)


class WritesBetween(Files):
    """Just before a pack is moved aside, somebody writes it again under its name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rename(self, source: str, target: str) -> None:
        if source == str(self.path):
            data = self.path.read_bytes()
            self.path.unlink()
            self.path.write_bytes(data)
        super().rename(source, target)


def test_a_file_that_was_written_again_gets_its_name_back(tmp_path: Path) -> None:
    path = tmp_path / "packs" / "x"
    path.parent.mkdir()
    path.write_bytes(b"the same again")
    age(tmp_path, "packs")
    assert LocalBlobs(tmp_path, files=WritesBetween(path)).delete_older("packs/x", LONG_S) == -1
    assert path.read_bytes() == b"the same again"
    age(tmp_path, "packs")
    blobs = LocalBlobs(tmp_path)
    assert blobs.ages("packs")["packs/x"] >= LONG_S
    assert blobs.delete_older("packs/x", LONG_S) == 14
    assert blobs.delete_older("packs/x", LONG_S) == -1
    assert files(tmp_path, "packs", "tmp") == []


class Told:
    """Events, and when one of a name came."""

    def __init__(self, name: str) -> None:
        self.name, self.events, self.came = name, [], threading.Event()

    def __call__(self, name: str, fields: dict[str, Any]) -> None:
        self.events.append((name, fields))
        if name == self.name:
            self.came.set()


def test_a_manager_removes_what_its_policy_gives_up_after_each_commit(run_dir: Path) -> None:
    told = Told("snapshot.removed")
    with CheckpointManager(run_dir, retention=LEAVES_ONE, on_event=told) as manager:
        for step in (1, 2):
            assert manager.save(step, state(step)).wait(WAIT_S).committed
        assert told.came.wait(WAIT_S)
    assert told.events[-1][1]["entries"] == ["000000000001-g0"]
    assert whole(run_dir) == ["000000000002-g0"]


def test_a_failure_to_collect_is_an_event_and_nothing_else(run_dir: Path) -> None:
    told = Told("snapshot.cleanup_failed")
    run_dir.mkdir()
    (run_dir / "retired").write_bytes(b"a file in the place of the directory")
    with CheckpointManager(run_dir, retention=LEAVES_ONE, on_event=told) as manager:
        for step in (1, 2, 3):
            assert manager.save(step, state(step)).wait(WAIT_S).committed
        assert told.came.wait(WAIT_S)
    assert "retired" in next(fields for name, fields in told.events if name == told.name)["reason"]
    assert load(run_dir)["step"] == 3
