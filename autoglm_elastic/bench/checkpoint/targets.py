"""The targets that the engine has set itself, judged on one run's medians. A target whose part was not
measured is not listed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from autoglm_elastic.bench.checkpoint.contenders import SAVERS, SMALL_SAVERS
from autoglm_elastic.bench.checkpoint.figures import (
    DCP,
    OURS,
    Parts,
    above_none,
    best,
    best_of,
    median,
    planning_s,
    planning_worlds,
)
from autoglm_elastic.bench.checkpoint.spec import LOAD_CASES, Rows

STALL_OF_MEMCPY_MAX: Final = 1.1
STALL_OF_DCP_MAX: Final = 0.25
SLOWDOWN_OF_DCP_MAX: Final = 0.5
DURABLE_SPEED_MIN: Final = 0.9
LOAD_SPEED_MIN: Final = {"cold_s": 0.9, "warm_s": 0.7}
SMALL_TIMES_MIN: Final = 7.0
PLANNING_TIMES_MIN: Final = 20.0


@dataclass(frozen=True, slots=True)
class Target:
    """`ratio` is to be at most (`at_most`) or at least `limit`."""

    what: str
    ratio: float
    limit: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.ratio <= self.limit if self.at_most else self.ratio >= self.limit

    @property
    def verdict(self) -> str:
        if self.met:
            return "met"
        factor = self.ratio / self.limit if self.at_most else self.limit / self.ratio if self.ratio > 0 else 0
        return f"missed by a factor of {factor:.2f}" if factor > 0 else "missed"

    @property
    def line(self) -> str:
        sign = "≤" if self.at_most else "≥"
        return f"{self.what} {sign} {self.limit:g}: {self.ratio:.2f}, {self.verdict}"


def judge(parts: Parts) -> list[Target]:
    found: list[Target] = []
    for kind in ("replicated", "sharded"):
        found += _saving(kind, parts.get(f"save-{kind}", {}), parts.get(f"durable-{kind}", {}))
    for case in LOAD_CASES:
        found += _loading(case, parts.get(f"load-{case}", {}))
    found += _small(parts.get("small", {}))
    found += _planning(parts.get("planning", {}))
    return found


def _saving(kind: str, during: Rows, still: Rows) -> Iterator[Target]:
    copy = median(during.get("memcpy"), "stall_s")
    plain = median(during.get("ours"), "stall_s")
    if copy and plain is not None:
        yield Target(f"{kind}: stall without overlap / memcpy", plain / copy, STALL_OF_MEMCPY_MAX, True)
    rival = best(during, DCP, lambda row: median(during[row], "stall_s"))
    slow = best(during, DCP, lambda row: above_none(during, row, "wall_s"))
    for row in OURS:
        title = SAVERS[row].title
        stall, slowdown = median(during.get(row), "stall_s"), above_none(during, row, "wall_s")
        if rival and stall is not None:
            yield Target(
                f"{kind}: stall of {title} / {SAVERS[rival[0]].title}",
                stall / rival[1],
                STALL_OF_DCP_MAX,
                True,
            )
        if slow and slowdown is not None and slow[1] > 0:
            yield Target(
                f"{kind}: slowdown by {title} / {SAVERS[slow[0]].title}",
                slowdown / slow[1],
                SLOWDOWN_OF_DCP_MAX,
                True,
            )
    ours, limit = median(still.get("ours"), "durable_s"), best_of(still, "write-", "durable_s")
    if ours and limit:
        yield Target(
            f"{kind}: write + fsync / durable, standing still", limit[1] / ours, DURABLE_SPEED_MIN, False
        )
    for rows, where in ((still, "standing still"), (during, "during training")):
        ours = median(rows.get("ours"), "durable_s")
        fast = best(rows, DCP, lambda row, rows=rows: median(rows[row], "durable_s"))  # type: ignore[misc]
        if ours and fast:
            yield Target(f"{kind}: durable, {where} / {SAVERS[fast[0]].title}", ours / fast[1], 1.0, True)


def _loading(case: str, rows: Rows) -> Iterator[Target]:
    for measure, least in LOAD_SPEED_MIN.items():
        how = measure.removesuffix("_s")
        ours, theirs = median(rows.get("ours"), measure), median(rows.get("dcp"), measure)
        limit = best_of(rows, "read-", measure)
        if ours and limit:
            yield Target(f"load {case}, {how}: read / verified load", limit[1] / ours, least, False)
        if ours and theirs:
            yield Target(f"load {case}, {how}: verified load / DCP unverified", ours / theirs, 1.0, True)


def _small(rows: Rows) -> Iterator[Target]:
    rivals = [one.name for one in SMALL_SAVERS.values() if one.kind == "dcp"]
    for measure, what in (("save_s", "save"), ("cold_s", "load, cold"), ("warm_s", "load, warm")):
        ours = median(rows.get("ours"), measure)
        fast = best(rows, rivals, lambda row, measure=measure: median(rows[row], measure))  # type: ignore[misc]
        if ours and fast:
            title = SMALL_SAVERS[fast[0]].title
            yield Target(f"small tensors, {what}: {title} / ours", fast[1] / ours, SMALL_TIMES_MIN, False)


def _planning(rows: Rows) -> Iterator[Target]:
    for world in planning_worlds(rows)[-1:]:
        ours, theirs = planning_s(rows.get("ours", {}), world), planning_s(rows.get("dcp", {}), world)
        if ours and theirs and ours[0] > 0:
            guessed = " (extrapolated)" if ours[1] or theirs[1] else ""
            yield Target(
                f"planning at {world} ranks: DCP / ours{guessed}",
                theirs[0] / ours[0],
                PLANNING_TIMES_MIN,
                False,
            )
