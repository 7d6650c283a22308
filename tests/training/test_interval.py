"""When the next snapshot is due does not begin anew with every generation: a job whose worlds break more often than the
interval still gets its snapshots."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from autoglm_elastic.core.lineage import GenerationRecord
from autoglm_elastic.core.recovery import Holding
from autoglm_elastic.ports import Outcome
from autoglm_elastic.settings import Settings
from autoglm_elastic.snapshot import Line
from autoglm_elastic.training.agreement import NEW_INTERVAL, Held, Interval, Stored, decide
from autoglm_elastic.training.snapshots import OURS, Snapshots

INTERVAL_S = 60.0


@contextlib.contextmanager
def generation(run_dir: Path, before: Interval) -> Iterator[Snapshots]:
    """A world of one."""
    settings = Settings()
    snapshot = msgspec.structs.replace(settings.snapshot, interval_s=INTERVAL_S, interval_steps=0)
    with contextlib.closing(Line(run_dir, settings=settings.keeper)) as line:
        snapshots = Snapshots(
            line,
            generation=0,
            rank=0,
            world_size=1,
            settings=msgspec.structs.replace(settings, snapshot=snapshot),
            votes_group=lambda: None,
            emit=lambda name, fields: None,
        )
        snapshots.resumed_at(0, [], before)
        with contextlib.closing(snapshots):
            yield snapshots


@pytest.mark.parametrize(
    ("before", "is_due"),
    [
        (NEW_INTERVAL, False),
        (Interval(INTERVAL_S / 2), False),
        (Interval(INTERVAL_S), True),
        (Interval(interrupted=True), True),
    ],
)
def test_what_went_before_counts(run_dir: Path, before: Interval, is_due: bool) -> None:
    with generation(run_dir, before) as snapshots:
        assert snapshots.due(1) is is_due
        after = snapshots.interval(NEW_INTERVAL)
    assert after.interrupted is is_due, "it was due and has not been begun"
    assert after.since_s >= (0 if is_due and before.since_s else before.since_s)


def test_one_that_is_committed_is_not_taken_again(run_dir: Path) -> None:
    with generation(run_dir, Interval(interrupted=True)) as snapshots:
        assert snapshots.due(1)
        snapshots.begin(1, {OURS: {}, "x": torch.ones(4)}, {})
        assert snapshots.wait(30.0)
        snapshots.broken()
        assert not snapshots.due(2)
        assert not snapshots.interval(NEW_INTERVAL).interrupted


def held(rank: int, interval: Interval, **more: Any) -> Held:
    holding = Holding(rank=rank, node="a", generation=1, step=5, complete=True)
    return Held(holding, {"seed": 1, "cursors": {}}, 1, interval=interval, followed=1, **more)


def test_a_newcomer_hears_how_far_it_has_run() -> None:
    told = decide(2, 2, [held(0, NEW_INTERVAL), held(1, Interval(40.0, True))], Stored())
    assert told.plan.tier == "live"
    assert told.interval == Interval(40.0, True)


def test_one_that_cannot_begin_is_not_taken_for_the_one_before(run_dir: Path) -> None:
    """Its generation's record was found to be somebody else's."""
    ours, theirs = (GenerationRecord(1, 0, step, None, "live") for step in (1, 2))
    with generation(run_dir, NEW_INTERVAL) as snapshots:
        snapshots.begin(1, {OURS: {}, "x": torch.ones(4)}, {})
        assert snapshots.wait(30.0)
        assert snapshots.put_generation(theirs, patient=True) is Outcome.OK
        snapshots.resumed_at(1, [ours], NEW_INTERVAL)
        assert snapshots.begin(2, {OURS: {}, "x": torch.ones(4)}, {}, last=True) is None
        assert not snapshots.wait(30.0)
        assert (snapshots.newest_begun, snapshots.committed_step, snapshots.busy) == (2, 1, False)
