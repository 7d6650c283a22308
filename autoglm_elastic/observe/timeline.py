"""A run over the clock, as a picture: steps, down time, the size of the world, and what each incident's time went into.

May touch: matplotlib (an extra, imported here only, without a display) and one picture file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from autoglm_elastic.errors import UsageError
from autoglm_elastic.observe.events import PHASES
from autoglm_elastic.observe.metrics import Metric
from autoglm_elastic.observe.report import Incident, Report
from autoglm_elastic.observe.text import count, duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCIDENTS_MAX: Final = 120
"""Bars that can be told apart; of more incidents the newest."""

BARS_MIN: Final = 8
"""So that a single incident is a bar and no wall."""

POINTS_MAX: Final = 20_000
_DPI: Final = 150
_INK: Final = "#1f2933"
_FAINT: Final = "#8a94a0"
_STEPS: Final = "#2563eb"
_DOWN: Final = "#dc2626"
_SNAPSHOT: Final = "#059669"
_WORLD: Final = "#93b4e8"
_COLORS: Final = ("#111827", "#7c3aed", "#2563eb", "#0891b2", "#059669", "#ca8a04", "#dc2626")
"""Of the phases, in order."""
_UNITS: Final = (
    (86_400.0, "days", 2.0),
    (3_600.0, "hours", 2.0),
    (60.0, "minutes", 3.0),
    (1.0, "seconds", 0.0),
)


def draw(path: str | os.PathLike[str], report: Report, steps: Sequence[Metric]) -> Path:
    """Draw the timeline into `path` (PNG), whole or not at all.

    Args:
        steps: every metric of the run, in the order of the file: a step that was redone is drawn twice.

    Raises UsageError when matplotlib is missing or no step was committed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("matplotlib is not installed", do="pip install 'autoglm-elastic[plot]'") from error
    if not steps:
        raise UsageError("no step of this run was committed", valid="job.commit() in the training script")

    figure = Figure(figsize=(10.5, 7.2), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    top, strip, bars = figure.subplots(3, 1, height_ratios=[5, 1.2, 3])
    strip.sharex(top)
    unit_s, unit = _unit(report.wall_s)
    _draw_steps(top, report, steps, unit_s)
    _draw_world(strip, report, unit_s, unit)
    _draw_phases(bars, report.incidents[-INCIDENTS_MAX:], len(report.incidents))
    top.set_title(_title(report), loc="left", color=_INK, fontsize=13, fontweight="bold", pad=12)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, target)
    return target


def _title(report: Report) -> str:
    goodput = "" if report.goodput is None else f", goodput {report.goodput:.1%}"
    return (
        f"{report.run_id or 'run'}: {report.status}, step {report.step}, {duration(report.wall_s)}, "
        f"{count(len(report.incidents), 'incident')}{goodput}"
    )


def _unit(wall_s: float) -> tuple[float, str]:
    return next((seconds, name) for seconds, name, least in _UNITS if wall_s >= least * seconds)


def _draw_steps(axes: Axes, report: Report, steps: Sequence[Metric], unit_s: float) -> None:
    every = max(1, len(steps) // POINTS_MAX)
    drawn = [*steps[::every], steps[-1]]
    axes.plot(
        [(metric.wall_time - report.started) / unit_s for metric in drawn],
        [metric.step for metric in drawn],
        color=_STEPS,
        linewidth=1.4,
        label="committed steps",
    )
    for number, item in enumerate(report.incidents):
        begun = item.opened if item.fault is None else item.fault
        axes.axvspan(
            (begun - report.started) / unit_s,
            ((report.ended if item.closed is None else item.closed) - report.started) / unit_s,
            color=_DOWN,
            alpha=0.35,
            linewidth=0.8,
            label="incident, to its first new step" if number == 0 else None,
        )
    committed = [note for note in report.snapshots if note.outcome == "committed"]
    if committed:
        axes.plot(
            [(note.wall_time - report.started) / unit_s for note in committed],
            [note.step for note in committed],
            linestyle="none",
            marker=".",
            markersize=5,
            color=_SNAPSHOT,
            label="snapshot committed",
        )
    _plain(axes)
    axes.set_ylabel("step", color=_INK)
    axes.margins(x=0.01)
    axes.legend(loc="upper left", frameon=False, fontsize=9, labelcolor=_INK)


def _draw_world(axes: Axes, report: Report, unit_s: float, unit: str) -> None:
    edges = [(span.start - report.started) / unit_s for span in report.spans]
    sizes = [span.world_size for span in report.spans]
    if edges:
        end = (report.ended - report.started) / unit_s
        axes.fill_between(
            [*edges, end], [*sizes, sizes[-1]], step="post", color=_WORLD, linewidth=0, alpha=0.8
        )
    _plain(axes)
    axes.set_ylim(0, max([*sizes, 1]) * 1.15)
    axes.set_ylabel("workers", color=_INK)
    axes.set_xlabel(unit, color=_INK)


def _draw_phases(axes: Axes, incidents: Sequence[Incident], total: int) -> None:
    first = total - len(incidents) + 1
    at = [first + index for index in range(len(incidents))]
    below = [0.0] * len(incidents)
    for phase, color in zip(PHASES, _COLORS, strict=True):
        heights = [item.phases_s.get(phase, 0.0) for item in incidents]
        if any(heights):
            axes.bar(at, heights, bottom=below, color=color, width=0.8, label=phase.replace("_", " "))
        below = [low + height for low, height in zip(below, heights, strict=True)]
    _plain(axes)
    axes.set_xlabel("incident" if first == 1 else f"incident (the newest {len(incidents)})", color=_INK)
    axes.set_ylabel("seconds", color=_INK)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlim(first - 0.5, first + max(len(incidents), BARS_MIN) - 0.5)
    if any(below):
        axes.legend(loc="upper left", ncols=7, frameon=False, fontsize=8, labelcolor=_INK)
        axes.set_ylim(0, max(below) * 1.25)


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(colors=_FAINT, labelcolor=_INK, labelsize=9)
