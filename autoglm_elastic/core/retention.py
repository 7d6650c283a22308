"""Which snapshots of a run are kept: a pure function of their catalog entries and a policy.

What one rule keeps is kept; the first reason found is told. The newest snapshot of the lineage (HEAD) and what has a
tag are always kept. Among the snapshots of one period (of steps or hours) the oldest stands for it, so that applying a
policy again, or after each new snapshot, gives up nothing that it kept before for the period's sake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Retention:
    """Of the lineage: the newest `keep_last`, the oldest of every `keep_every_steps` steps and of every
    `keep_every_hours` hours, the `keep_best` best by the metric `best_metric`. Zero turns a rule off; with `keep_last`
    0 nothing is ever given up. Snapshots outside of the lineage are kept for `keep_abandoned_hours` after they were
    written, so that a rollback can be undone."""

    keep_last: int = 0
    keep_every_steps: int = 0
    keep_every_hours: float = 0.0
    keep_best: int = 0
    best_metric: str = ""
    best_is: Literal["min", "max"] = "min"
    keep_abandoned_hours: float = 168.0


@dataclass(frozen=True, slots=True)
class Kept:
    """What the policy needs to know of a snapshot. `wall_time`: seconds since the epoch."""

    name: str
    step: int
    generation: int
    wall_time: float
    in_lineage: bool = True
    tagged: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


def reasons(policy: Retention, snapshots: Iterable[Kept], now: float) -> dict[str, str]:
    """Name → why it is kept, for every snapshot that is; those that are not named may go."""
    everything = sorted(snapshots, key=lambda one: (one.step, one.generation))
    line = [one for one in everything if one.in_lineage]
    kept: dict[str, str] = {}

    def keep(some: Iterable[Kept], why: str) -> None:
        for one in some:
            kept.setdefault(one.name, why)

    keep(line[-1:], "HEAD")
    keep((one for one in everything if one.tagged), "tagged")
    if policy.keep_last <= 0:
        keep(everything, "nothing is given up")
        return kept
    keep(line[-policy.keep_last :], f"one of the last {policy.keep_last}")
    if policy.keep_best > 0 and policy.best_metric:
        keep(_best(policy, line), f"best by {policy.best_metric}")
    if policy.keep_every_steps > 0:
        every = policy.keep_every_steps
        keep(_first_of_each(line, lambda one: one.step // every), f"every {every} steps")
    if policy.keep_every_hours > 0:
        period_s = policy.keep_every_hours * _HOUR_S
        by_time = sorted(line, key=lambda one: (one.wall_time, one.step, one.generation))
        hours = f"every {policy.keep_every_hours:g} h"
        keep(_first_of_each(by_time, lambda one: math.floor(one.wall_time / period_s)), hours)
    young_s = policy.keep_abandoned_hours * _HOUR_S
    abandoned = (one for one in everything if not one.in_lineage)
    keep((one for one in abandoned if now - one.wall_time < young_s), "outside of the lineage, but young")
    return kept


def _best(policy: Retention, line: list[Kept]) -> list[Kept]:
    rated = [one for one in line if math.isfinite(one.metrics.get(policy.best_metric, math.nan))]
    sign = 1.0 if policy.best_is == "min" else -1.0
    rated.sort(key=lambda one: (sign * one.metrics[policy.best_metric], one.step, one.generation))
    return rated[: policy.keep_best]


def _first_of_each(ordered: list[Kept], period_of: Callable[[Kept], int]) -> list[Kept]:
    first: dict[int, Kept] = {}
    for one in ordered:
        first.setdefault(period_of(one), one)
    return list(first.values())
