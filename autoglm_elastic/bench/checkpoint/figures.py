"""From samples to figures: medians, differences within a round, and which of several is best."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from autoglm_elastic.bench.checkpoint.contenders import SAVERS
from autoglm_elastic.bench.checkpoint.saving import NONE
from autoglm_elastic.bench.checkpoint.spec import Measures, Rows

Parts = Mapping[str, Rows]
OURS: Final = tuple(one.name for one in SAVERS.values() if one.kind == "ours")
DCP: Final = tuple(one.name for one in SAVERS.values() if one.kind == "dcp")


def median(measures: Measures | None, name: str) -> float | None:
    samples = (measures or {}).get(name)
    return statistics.median(samples) if samples else None


def worst(measures: Measures | None, name: str) -> float | None:
    samples = (measures or {}).get(name)
    return max(samples) if samples else None


def above_none(rows: Rows, row: str, name: str) -> float | None:
    """Median over the rounds of a window's figure less that of the round's window without a snapshot."""
    samples, without = rows.get(row, {}).get(name), rows.get(NONE, {}).get(name)
    if not samples or not without:
        return None
    return statistics.median(one - other for one, other in zip(samples, without, strict=True))


def best(rows: Rows, names: Iterable[str], of: Callable[[str], float | None]) -> tuple[str, float] | None:
    """The lowest, with its row."""
    found = [(value, name) for name in names if name in rows and (value := of(name)) is not None]
    return (min(found)[1], min(found)[0]) if found else None


def best_of(rows: Rows, prefix: str, name: str) -> tuple[str, float] | None:
    """The lowest median of all rows that begin with `prefix`."""
    return best(rows, [row for row in rows if row.startswith(prefix)], lambda row: median(rows[row], name))


def planning_s(measures: Measures, world: int) -> tuple[float, bool] | None:
    """(the slowest rank's part and the coordinator's, whether any of it is extrapolated)."""
    local, merged = median(measures, f"local_{world}_s"), median(measures, f"merge_{world}_s")
    guess = median(measures, f"merge_{world}_extrapolated_s")
    if local is None or (merged is None and guess is None):
        return None
    return local + (merged if merged is not None else guess or 0.0), merged is None


def planning_worlds(rows: Rows) -> list[int]:
    return sorted(
        {
            int(name.split("_")[1])
            for measures in rows.values()
            for name in measures
            if name.startswith("local_")
        }
    )
