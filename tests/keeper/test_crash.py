"""A crash of the machine while packs are written side by side, decided, finished for dead ranks, or collected: the old
recovery point or the new one, whole."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoglm_elastic.catalog import failpoints
from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import prepared as records
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.core.commit import Snapshot, Verdict
from autoglm_elastic.core.lineage import GenerationRecord
from autoglm_elastic.keeper import writer as writer_module
from autoglm_elastic.keeper.finish import Fate, Finisher
from autoglm_elastic.storage import LocalBlobs
from tests.keeper.saving import WALL, collect, decided, prepared, reached, whole, written
from tests.keeper.state import Share
from tests.keeper.turns import TurningWriter, Turns
from tests.snapshot.disk_model import Image, Unsynced, images

Log = list[tuple[Any, ...]]
PACKS = writer_module.FILES_IN_FLIGHT
GOES_ON_EVERY = 16
"""In one of so many images the next snapshot is made and garbage collected."""


@pytest.fixture(autouse=True)
def several_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each pack: two of data, then the head."""
    monkeypatch.setattr(writer_module, "WRITE_BYTES", 96)


def share(rank: int = 0, world_size: int = 1) -> Share:
    return Share(rank=rank, world_size=world_size, tensors=PACKS, elements=48 * world_size)


def record(root: Path, seed: int) -> Turns:
    """A generation, two snapshots, then the older one is given up; what was promised is marked."""
    files = Turns(root, seed)
    blobs = LocalBlobs(root, files=files)
    Catalog(blobs).put_generation(GenerationRecord(0, -1, -1, None, "fresh"))
    files.mark("lineage")
    for step in (1, 2):
        mine = TurningWriter(blobs, files)
        with files.naming():
            result = written(blobs, share(), step, mine)
        mine.close()
        assert result.reason == ""
        assert decided(blobs, share(), step, result) == (Verdict.COMMIT, "")
        files.mark(f"committed {step}")
    files.mark("given up 1")
    assert collect(blobs).retired == [Catalog(blobs).names()[0].replace("2-g", "1-g")]
    return files


def record_finished(root: Path, seed: int) -> Turns:
    """Two ranks that died behind their writing, whose keepers finish the snapshot; over a snapshot before it."""
    files = Turns(root, seed)
    blobs = LocalBlobs(root, files=files)
    Catalog(blobs).put_generation(GenerationRecord(0, -1, -1, None, "fresh"))
    files.mark("lineage")
    for step in (1, 2):
        snapshot = Snapshot(step, 0)
        fates = []
        for rank in (0, 1):
            one = share(rank, 2)
            mine = TurningWriter(blobs, files)
            with files.naming():
                result = written(blobs, one, step, mine)
            mine.close()
            details = fmt.decode(one.details(snapshot), records.Details, "details")
            finisher = Finisher(blobs, failpoints.none, lambda: WALL)
            fates.append(finisher.finish(snapshot, rank, 2, prepared(one, result), details)[0])
        assert fates == [Fate.WAITING, Fate.COMMITTED]
        files.mark(f"committed {step}")
    return files


def problems(image: Image, where: Path, goes_on: bool) -> list[str]:
    image.build(where)
    steps, found = whole(where)
    given_up = {int(fact.split()[2]) for fact in image.facts if fact.startswith("given up")}
    promised = {int(fact.split()[1]) for fact in image.facts if fact.startswith("committed")}
    lost = promised - given_up - set(steps)
    if lost:
        found.append(f"steps {sorted(lost)} were promised, but only {steps} are there")
    if "lineage" in image.facts and len(Catalog(LocalBlobs(where)).records()) != 1:
        found.append("the record of the generation is lost")
    if goes_on and not found:
        blobs = LocalBlobs(where, files=Unsynced())
        result = written(blobs, share(), 9)
        assert decided(blobs, share(), 9, result) == (Verdict.COMMIT, "")
        for _ in range(2):  # the first settles what is prepared, the second collects its packs
            assert collect(blobs).blocked == ""
        after, found = whole(where)
        named, there = reached(where)
        if after != [9] or named != there:
            found.append(f"the next one and its collection left {after}, {sorted(named ^ there)}")
    shutil.rmtree(where)
    return found


def crash_everywhere(
    log: Log, root: Path, scratch: Path, seed: int, *, stop: bool = False
) -> tuple[int, list[str]]:
    """(different images looked at, what was wrong). `stop` at the first problem."""
    rng = random.Random(seed)
    seen: set[Image] = set()
    found: list[str] = []
    for image in images(log, str(root), seed):
        if image not in seen:
            seen.add(image)
            goes_on = not stop and rng.randrange(GOES_ON_EVERY) == 0
            found += problems(image, scratch / "image", goes_on)
            if found and stop:
                break
    return len(seen), found


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("scenario", "least"), [(record, 50), (record_finished, 50)])
def test_every_crash_leaves_the_old_or_the_new_snapshot(
    tmp_path: Path, scenario: Callable[[Path, int], Turns], least: int, seed: int
) -> None:
    root = tmp_path / "run"
    files = scenario(root, seed)
    assert files.most_waiting == PACKS, "all packs are in flight at once"
    count, found = crash_everywhere(files.log, root, tmp_path, seed)
    print(f"{scenario.__name__}, seed {seed}: {len(files.log)} calls, {count} images of a crashed disk")
    assert found == []
    assert len(files.log) > 100
    assert count > least


class Overtaken(Turns):
    """Before a directory of that name is made durable for the first time, somebody else does all of `other`."""

    def __init__(self, root: Path, folder: str) -> None:
        super().__init__(root, 1)
        self.folder = folder
        self.other: Callable[[], None] | None = None

    def fsync_directory(self, path: str) -> None:
        if self.other is not None and os.path.basename(path) == self.folder:
            other, self.other = self.other, None
            other()
        super().fsync_directory(path)


@pytest.mark.parametrize("folder", ["manifests", "catalog"])
def test_one_who_finds_the_others_file_can_count_on_it(tmp_path: Path, folder: str) -> None:
    """Two keepers finish the same snapshot. The second finds names that the first has made but not made durable."""
    root = tmp_path / "run"
    files = Overtaken(root, folder)
    blobs = LocalBlobs(root, files=files)
    one, snapshot = share(), Snapshot(1, 0)
    result = written(blobs, one, 1)
    details = fmt.decode(one.details(snapshot), records.Details, "details")

    def finish() -> None:
        mine = LocalBlobs(root, files=files)
        fate, reason = Finisher(mine, failpoints.none, lambda: WALL).finish(
            snapshot, 0, 1, prepared(one, result), details
        )
        assert fate is Fate.COMMITTED, reason
        files.mark("committed 1")

    files.other = finish
    finish()
    assert files.other is None
    count, found = crash_everywhere(files.log, root, tmp_path, 1)
    print(f"{folder}: {count} images of a crashed disk")
    assert found == []
    assert count > 10


def test_a_seed_replays_the_same_order(tmp_path: Path) -> None:
    def order(where: Path, seed: int) -> list[Any]:
        calls = record(where, seed).log
        return [(call[0], *(at for at in call[1:] if isinstance(at, int | bytes))) for call in calls]

    first, again, other = (order(tmp_path / str(at), seed) for at, seed in enumerate((5, 5, 6)))
    assert first == again
    assert first != other


# Bugs, planted in what was recorded: each must be found.


def targets(log: Log) -> dict[int, str]:
    """File → the name that it gets."""
    names: dict[str, int] = {}
    found: dict[int, str] = {}
    for kind, *rest in log:
        if kind == "create":
            names[rest[0]] = rest[1]
        elif kind in ("rename", "link") and rest[0] in names:
            found[names[rest[0]]] = rest[1]
    return found


def without_fsync_of(folder: str) -> Callable[[Log], Log]:
    def plant(log: Log) -> Log:
        names = targets(log)
        return [call for call in log if not (call[0] == "fsync" and f"/{folder}/" in names.get(call[1], ""))]

    return plant


def without_directory_fsync(matching: Callable[[str], bool]) -> Callable[[Log], Log]:
    def plant(log: Log) -> Log:
        return [call for call in log if not (call[0] == "fsync_directory" and matching(call[1]))]

    return plant


def head_behind_the_fsync(log: Log) -> Log:
    """The fsync comes before the head is written, and no other follows."""
    planted: Log = []
    for call in log:
        if call[0] == "fsync" and planted[-1][0] == "write" and "/packs/" in targets(log).get(call[1], ""):
            planted.insert(-1, call)
        else:
            planted.append(call)
    return planted


def moved(log: Log, kind: str, folder: str, to: int) -> Log:
    """The last call of that kind on a name in `folder`, with its directory's fsync, comes at place `to`."""
    at = max(place for place, call in enumerate(log) if call[0] == kind and f"/{folder}/" in call[-1])
    assert log[at + 1][0] == "fsync_directory" or log[at + 2][0] == "fsync_directory"
    rest = [*log[:at], *log[at + 1 :]]
    return [*rest[:to], log[at], *rest[to:]]


PLANTED: dict[str, Callable[[Log], Log]] = {
    "no fsync of packs": without_fsync_of("packs"),
    "no fsync of manifests": without_fsync_of("manifests"),
    "no fsync of entries": without_fsync_of("catalog"),
    "no fsync of generation records": without_fsync_of("generations"),
    "no fsync of the packs' directories": without_directory_fsync(
        lambda path: os.path.basename(os.path.dirname(path)) == "packs"
    ),
    "no fsync of the parent of packs": without_directory_fsync(lambda path: path.endswith("/packs")),
    "no fsync of the root": without_directory_fsync(lambda path: path.endswith("/run")),
    "no fsync of manifests' directory": without_directory_fsync(lambda path: path.endswith("/manifests")),
    "no fsync of the catalog's directory": without_directory_fsync(lambda path: path.endswith("/catalog")),
    "the head behind the fsync": head_behind_the_fsync,
    "the entry before the manifest": lambda log: moved(log, "link", "manifests", len(log)),
    "packs removed before the entry": lambda log: moved(log, "unlink", "catalog", len(log)),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    root = tmp_path_factory.mktemp("recorded") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "WRITE_BYTES", 96)
        return root, record(root, 4).log


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(recorded: tuple[Path, Log], tmp_path: Path, name: str) -> None:
    root, log = recorded
    planted = PLANTED[name](log)
    assert planted != log
    count, found = crash_everywhere(planted, root, tmp_path, 4, stop=True)
    print(f"{name}: found in image {count}: {found[:1]}")
    assert found != []
