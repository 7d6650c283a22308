"""A prepare that lasts longer than garbage collection waits for: a process may be stopped for hours between any two
effects of a commit, and meanwhile its packs may go. On a clock that the tests move, with the real collector."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autoglm_elastic.catalog import failpoints, limits
from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import prepared as records
from autoglm_elastic.catalog.collect import Collected, Collector
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.verify import verify
from autoglm_elastic.core.commit import Snapshot, Verdict
from autoglm_elastic.core.retention import Retention
from autoglm_elastic.errors import PlatformError
from autoglm_elastic.keeper.finish import Fate, Finisher
from autoglm_elastic.snapshot import CheckpointManager
from autoglm_elastic.storage import LocalBlobs
from autoglm_elastic.storage.files import Files
from tests.keeper.saving import WALL, decided, prepared, written
from tests.keeper.state import Share

SHARE = Share(rank=0, world_size=1)
OLD, NEW = "000000000001-g0", "000000000002-g0"
AROUND = ("manifest_written", "entry_due", "entry_put")


class Moved(Files):
    """Files get the times of a clock that is ahead by `by_s`."""

    by_s = 0.0

    def fsync(self, fd: int) -> None:
        os.utime(fd, (os.fstat(fd).st_mtime + self.by_s,) * 2)
        super().fsync(fd)


class Later(LocalBlobs):
    """A directory whose clock can be moved; what is in it grows older by that."""

    broken = False

    def __init__(self, root: Path) -> None:
        self.clock = Moved()
        super().__init__(root, files=self.clock)

    def move(self, by_s: float) -> None:
        self.clock.by_s += by_s

    def now(self) -> float:
        if self.broken:
            raise PlatformError("no space for a file whose time could be told")
        return super().now() + self.clock.by_s


class Killed(BaseException):
    """Stands for the process' death."""


@pytest.fixture
def blobs(run_dir: Path) -> Later:
    """With one snapshot, of step 1."""
    later = Later(run_dir)
    assert decided(later, SHARE, 1, written(later, SHARE, 1)) == (Verdict.COMMIT, "")
    return later


def collected(blobs: LocalBlobs) -> Collected:
    policy = Retention(keep_last=1, keep_abandoned_hours=0)
    age_s = limits.PREPARE_S_MAX
    return Collector(blobs, policy, grace_s=limits.GRACE_S, age_s=age_s, wall=lambda: WALL).run()


def collect(blobs: LocalBlobs) -> Collected:
    done = collected(blobs)
    assert done.blocked == ""
    return done


def damaged(blobs: LocalBlobs) -> list[str]:
    catalog = Catalog(blobs)
    return [entry.name for entry in catalog.entries() if verify(blobs, catalog, entry)]


def names(blobs: LocalBlobs) -> list[str]:
    return Catalog(blobs).names()


def test_votes_that_are_too_old_are_not_decided(blobs: Later) -> None:
    result = written(blobs, SHARE, 2)
    blobs.move(limits.COMMIT_S_MAX)
    verdict, reason = decided(blobs, SHARE, 2, result)
    assert verdict is Verdict.ABORT
    assert "too long ago" in reason
    assert names(blobs) == [OLD]


def test_just_in_time_counts_and_is_seen_by_every_collection_that_could_harm(blobs: Later) -> None:
    result = written(blobs, SHARE, 2)
    blobs.move(limits.COMMIT_S_MAX - 60.0)
    assert decided(blobs, SHARE, 2, result) == (Verdict.COMMIT, "")
    blobs.move(limits.PREPARE_S_MAX - limits.COMMIT_S_MAX + 120.0)
    assert collect(blobs).packs == 0
    assert (names(blobs), damaged(blobs)) == ([NEW], [])


@pytest.mark.parametrize("point", AROUND)
@pytest.mark.parametrize("stopped_s", [0.0, 2900.0, 3100.0, 3500.0, 3700.0, 7300.0])
def test_stopped_anywhere_around_the_put(blobs: Later, point: str, stopped_s: float) -> None:
    """The collector comes at the end of the stop, and once more when all is over."""
    result = written(blobs, SHARE, 2)

    def stop(here: str) -> None:
        if here == point:
            blobs.move(stopped_s)
            collect(blobs)

    verdict, reason = decided(blobs, SHARE, 2, result, stop)
    in_time = stopped_s < limits.COMMIT_S_MAX
    assert verdict is (
        Verdict.COMMIT if in_time else Verdict.ABORT if point == AROUND[0] else Verdict.UNKNOWN
    )
    assert ("too long ago" in reason) is not in_time
    collect(blobs)
    assert names(blobs) == [NEW if in_time else OLD]
    assert damaged(blobs) == []


@pytest.mark.parametrize("point", AROUND[1:])
def test_stopped_and_then_killed_before_it_could_take_it_back(blobs: Later, point: str) -> None:
    """The entry stays, without packs: it costs nobody another snapshot, and is passed over. What it reaches nobody can
    tell any more, so nothing else is collected until somebody removes it."""
    result = written(blobs, SHARE, 2)

    def stop(here: str) -> None:
        if here == point:
            blobs.move(2 * limits.GRACE_S)
            collect(blobs)
        if here == "entry_put":
            raise Killed

    with pytest.raises(Killed):
        decided(blobs, SHARE, 2, result, stop)
    assert names(blobs)[-1] == NEW
    for _ in range(3):
        collected(blobs)
        blobs.move(2 * limits.GRACE_S)
    if point == "entry_due":
        assert (names(blobs), damaged(blobs)) == ([OLD, NEW], [NEW])
        assert "is missing" in collected(blobs).kept[NEW]
        assert "is missing" in collected(blobs).blocked
        with CheckpointManager(blobs) as manager:
            found = manager.newest_verified()
            assert found is not None
            assert found.name == OLD
    else:  # the entry was there in time
        assert (names(blobs), damaged(blobs)) == ([NEW], [])


def test_what_was_given_up_for_an_entry_that_is_taken_back_returns(blobs: Later) -> None:
    """Somebody with a shorter look (its clock runs behind) collects between the put and the taking back."""
    result = written(blobs, SHARE, 2)

    def stop(here: str) -> None:
        if here == "entry_put":
            assert collect(blobs).retired == [OLD]
            blobs.move(limits.COMMIT_S_MAX)

    assert decided(blobs, SHARE, 2, result, stop)[0] is Verdict.UNKNOWN
    assert names(blobs) == []
    assert collect(blobs).restored == [OLD]
    assert (names(blobs), damaged(blobs)) == ([OLD], [])


def test_a_clock_that_cannot_be_read_promises_nothing(blobs: Later) -> None:
    result = written(blobs, SHARE, 2)

    def fail(here: str) -> None:
        blobs.broken = here == "entry_put"

    assert decided(blobs, SHARE, 2, result, fail)[0] is Verdict.UNKNOWN
    blobs.broken = True
    verdict, reason = decided(blobs, SHARE, 3, result)
    assert (verdict, "no space" in reason) == (Verdict.ABORT, True)
    assert names(blobs) == [OLD, NEW]


def test_keepers_do_not_finish_what_is_too_old(blobs: Later) -> None:
    """One of two keepers was stopped for hours before it could write down what its rank had prepared."""
    snapshot = Snapshot(2, 0)
    shares = [Share(rank=rank, world_size=2) for rank in (0, 1)]
    results = [written(blobs, share, 2) for share in shares]
    finisher = Finisher(blobs, failpoints.none, lambda: WALL)
    fates = []
    for share, result in zip(shares, results, strict=True):
        details = fmt.decode(share.details(snapshot), records.Details, "details")
        fates.append(finisher.finish(snapshot, share.rank, 2, prepared(share, result), details))
        blobs.move(limits.COMMIT_S_MAX)
    assert fates[0][0] is Fate.WAITING
    assert fates[1][0] is Fate.ABORTED
    assert "too long ago" in fates[1][1]
    collect(blobs)
    assert records.entries(blobs) == [snapshot], "its keeper might still be about to decide"
    blobs.move(limits.PREPARE_S_MAX)
    assert collect(blobs).leftovers == 1
    assert collect(blobs).packs == sum(len(result.packs) for result in results)
    assert (names(blobs), damaged(blobs)) == ([OLD], [])
