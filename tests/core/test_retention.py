"""Which snapshots are kept: examples of each rule, and what must hold for every policy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_elastic.core.retention import Kept, Retention, reasons

HOUR = 3600.0


def row(step: int, *, hour: float = 0.0, generation: int = 1, **other: object) -> Kept:
    return Kept(f"{step}-g{generation}", step, generation, hour * HOUR, **other)  # type: ignore[arg-type]


def kept_steps(policy: Retention, rows: list[Kept], now: float = 0.0) -> list[int]:
    kept = reasons(policy, rows, now)
    return [one.step for one in rows if one.name in kept]


LINE = [row(step, hour=step / 4, metrics={"loss": abs(step - 5)}) for step in range(1, 13)]


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        (Retention(), list(range(1, 13))),
        (Retention(keep_last=1), [12]),
        (Retention(keep_last=3), [10, 11, 12]),
        (Retention(keep_last=1, keep_every_steps=5), [1, 5, 10, 12]),
        (Retention(keep_last=1, keep_every_hours=1), [1, 4, 8, 12]),
        (Retention(keep_last=1, keep_best=2, best_metric="loss"), [4, 5, 12]),
        (Retention(keep_last=1, keep_best=1, best_metric="loss", best_is="max"), [12]),
        (Retention(keep_last=1, keep_best=3, best_metric="accuracy"), [12]),
    ],
)
def test_each_rule(policy: Retention, steps: list[int]) -> None:
    assert kept_steps(policy, LINE) == steps


def test_tags_and_head_are_always_kept() -> None:
    rows = [row(1, tagged=True), row(2), row(3), row(9, generation=2, in_lineage=False, tagged=True)]
    assert reasons(Retention(keep_last=1, keep_abandoned_hours=0), rows, 10 * HOUR) == {
        "3-g1": "HEAD",
        "1-g1": "tagged",
        "9-g2": "tagged",
    }


def test_what_was_rolled_back_from_is_kept_until_it_is_old() -> None:
    policy = Retention(keep_last=1, keep_abandoned_hours=2)
    rows = [row(1), row(2, hour=1, in_lineage=False)]
    assert kept_steps(policy, rows, now=2.9 * HOUR) == [1, 2]
    assert kept_steps(policy, rows, now=3.1 * HOUR) == [1]


ROWS = st.lists(
    st.builds(
        row,
        st.integers(0, 60),
        hour=st.floats(0, 50, allow_nan=False),
        generation=st.integers(1, 3),
        in_lineage=st.booleans(),
        tagged=st.booleans(),
        metrics=st.dictionaries(st.just("loss"), st.floats()),
    ),
    max_size=25,
    unique_by=lambda one: one.name,
)
POLICIES = st.builds(
    Retention,
    keep_last=st.integers(0, 5),
    keep_every_steps=st.integers(0, 10),
    keep_every_hours=st.sampled_from([0.0, 0.5, 3.0]),
    keep_best=st.integers(0, 3),
    best_metric=st.sampled_from(["", "loss"]),
    best_is=st.sampled_from(["min", "max"]),
    keep_abandoned_hours=st.sampled_from([0.0, 5.0]),
)


@given(POLICIES, ROWS, st.floats(0, 100 * HOUR))
def test_head_and_tags_survive_every_policy_and_order_does_not_matter(
    policy: Retention, rows: list[Kept], now: float
) -> None:
    kept = reasons(policy, rows, now)
    line = [one for one in rows if one.in_lineage]
    if line:
        assert max(line, key=lambda one: (one.step, one.generation)).name in kept
    assert {one.name for one in rows if one.tagged} <= set(kept)
    assert reasons(policy, rows[::-1], now) == kept
    assert all(one.name in kept for one in rows) or policy.keep_last > 0


@given(POLICIES, ROWS, st.floats(0, 100 * HOUR))
def test_applying_it_again_gives_up_nothing_more(policy: Retention, rows: list[Kept], now: float) -> None:
    kept = reasons(policy, rows, now)
    left = [one for one in rows if one.name in kept]
    assert set(reasons(policy, left, now)) == set(kept)


@given(
    st.integers(1, 4),
    st.integers(1, 10),
    st.lists(st.integers(1, 6), min_size=1, max_size=40),
)
def test_collecting_after_every_snapshot_keeps_the_same_periods(
    last: int, every: int, gaps: list[int]
) -> None:
    """Whoever collects often has at the end what a single collection would have left."""
    policy = Retention(keep_last=last, keep_every_steps=every)
    steps = list(itertools.accumulate(gaps))
    alive: list[Kept] = []
    for step in steps:
        alive.append(row(step))
        kept = reasons(policy, alive, 0.0)
        alive = [one for one in alive if one.name in kept]
    assert set(reasons(policy, [row(step) for step in steps], 0.0)) == {one.name for one in alive}


def test_more_is_kept_by_more_rules() -> None:
    one = set(reasons(Retention(keep_last=2), LINE, 0.0))
    assert one < set(reasons(replace(Retention(keep_last=2), keep_every_steps=3), LINE, 0.0))
