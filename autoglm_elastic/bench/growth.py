"""How the cost of a recovery and of a snapshot grows with the nodes: simulated, fitted, drawn.

    autoglm simulate --growth [--sizes 16,256,4096] [--png FILE] [--json]

`sim/growth.py` counts; the leader's time is measured here, since it is this machine's: the seconds of a core that
`core.membership` takes. May touch: a clock, one picture file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from autoglm_elastic.bench.machine import describe, sentence
from autoglm_elastic.core import membership
from autoglm_elastic.core.membership import Effect, Event, LeaderState
from autoglm_elastic.errors import UsageError
from autoglm_elastic.observe.text import duration
from autoglm_elastic.sim.core import Core
from autoglm_elastic.sim.growth import Cost, Growth, measure

SIZES: Final = (16, 64, 256, 1024, 4096)
_WHAT: Final = {
    "start": "start to first step",
    "snapshot": "snapshot",
    "worker": "recovery, worker died",
    "node": "recovery, node lost (lease 2 s)",
}
_COUNTS: Final = {"store_operations": "store operations", "blobs": "blobs written", "pushes": "watch pushes"}
_COLORS: Final = ("#2563eb", "#059669", "#dc2626", "#f59e0b")


@dataclass(frozen=True, slots=True)
class Row:
    """One size. `leader_s`: of a core, for the whole job (a start, two recoveries, the end); `simulated_s`: likewise,
    for the simulation of it all."""

    growth: Growth
    leader_s: float
    simulated_s: float

    def cost(self, name: str) -> Cost:
        cost: Cost = getattr(self.growth, name)
        return cost


def sizes(text: str) -> list[int]:
    """Raises UsageError for what is no comma-separated list of at least two sizes."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < 2:
        raise UsageError(f"--sizes {text}", valid="two sizes or more, such as 16,256,4096")
    return sorted({int(part) for part in parts})


def rows(wanted: Sequence[int] = SIZES) -> Iterator[Row]:
    """Smallest first; each when it is there."""
    for nodes in wanted:
        leader_s = 0.0

        def lead(state: LeaderState, event: Event) -> tuple[LeaderState, tuple[Effect, ...]]:
            nonlocal leader_s
            begun = time.perf_counter()
            told = membership.step(state, event)
            leader_s += time.perf_counter() - begun
            return told

        begun = time.perf_counter()
        growth = measure(nodes, Core(lead=lead))
        yield Row(growth, leader_s, time.perf_counter() - begun)


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of log y over log x by least squares: y grows as x to that power. None when a y is 0."""
    if any(y <= 0 for _, y in points):
        return None
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def lines(found: Sequence[Row]) -> Iterator[str]:
    """A table for each count, with the fit."""
    header = "".join(f"{row.growth.nodes:>11}" for row in found)
    for field, title in {**_COUNTS, "virtual_s": "virtual time"}.items():
        yield f"{title + ', nodes':<34}{header}   grows as"
        for name, what in _WHAT.items():
            values = [float(getattr(row.cost(name), field)) for row in found]
            shown = [duration(each) if field == "virtual_s" else f"{each:.0f}" for each in values]
            yield f"  {what:<32}{''.join(f'{each:>11}' for each in shown)}   {_fit(found, values)}"
        yield ""
    values = [row.leader_s for row in found]
    leading = "".join(f"{duration(each):>11}" for each in values)
    yield f"{'leader, of a core, whole job':<34}{leading}   {_fit(found, values)}"
    yield f"{'simulated in':<34}{''.join(f'{duration(row.simulated_s):>11}' for row in found)}"
    yield sentence(describe())


def _fit(found: Sequence[Row], values: Sequence[float]) -> str:
    power = exponent([(row.growth.nodes, value) for row, value in zip(found, values, strict=True)])
    return "-" if power is None else f"n^{power:.2f}"


def draw(path: Path, found: Sequence[Row]) -> None:
    """Both as a picture: counts on the left, virtual time on the right, fits as dotted lines. Raises UsageError without
    matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--png without matplotlib", do="pip install 'autoglm-elastic[plot]'") from None
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    xs = [row.growth.nodes for row in found]
    counts = [
        ("worker", "store_operations", "store operations, recovery"),
        ("snapshot", "blobs", "blobs written, snapshot"),
        ("worker", "pushes", "watch pushes, recovery"),
    ]
    for (name, field, label), color, size in zip(counts, _COLORS, (11, 5, 7), strict=False):
        ys = [float(getattr(row.cost(name), field)) for row in found]
        left.plot(xs, ys, "o", color=color, markersize=size, label=f"{label}: {_fit(found, ys)}")
        _line(left, xs, ys, color)
    for (name, what), color in zip(_WHAT.items(), _COLORS, strict=True):
        right.plot(xs, [row.cost(name).virtual_s for row in found], "o-", color=color, label=what)
    left.set_title("counted in the simulator")
    right.set_title("virtual seconds: round trips, one after another")
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("nodes")
        axes.grid(color="#e5e9ee")
        axes.legend(fontsize=8)
    figure.savefig(path)


def _line(axes: object, xs: Sequence[int], ys: Sequence[float], color: str) -> None:
    power = exponent(list(zip(xs, ys, strict=True)))
    if power is not None:
        shift = sum(math.log(y) - power * math.log(x) for x, y in zip(xs, ys, strict=True)) / len(xs)
        fitted = [math.exp(shift + power * math.log(x)) for x in xs]
        axes.plot(xs, fitted, ":", color=color)  # type: ignore[attr-defined]
