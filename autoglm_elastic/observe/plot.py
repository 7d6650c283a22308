"""The loss curve of a run as a picture: incidents, growth and snapshots marked, the world's size in a strip
below.

May touch: matplotlib (an extra, imported here only, without a display) and one picture file.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from autoglm_elastic.errors import UsageError
from autoglm_elastic.observe.metrics import Metric, lineage
from autoglm_elastic.observe.report import Report
from autoglm_elastic.observe.text import count, duration, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK: Final = "#1f2933"
_FAINT: Final = "#8a94a0"
_LOSS: Final = "#2563eb"
_UNDISTURBED: Final = "#f59e0b"
_INCIDENT: Final = "#dc2626"
_GROWTH: Final = "#059669"
_WORLD: Final = "#93b4e8"
_DPI: Final = 150
LABELS_MAX: Final = 8
"""More incidents than these have no labels: they would hide the curve."""

SMOOTHED_PARTS: Final = 40
"""A long curve is shown as means over a fortieth of it, with the single steps behind: the noise of batches is
no news."""


def loss_curve(
    path: str | os.PathLike[str],
    report: Report,
    steps: Sequence[Metric],
    *,
    undisturbed: Sequence[Metric] = (),
    title: str = "",
) -> Path:
    """Draw the loss of the committed steps over the step into `path` (PNG), whole or not at all.

    `undisturbed`: the metrics of a run of the same seed to which nothing happened, drawn below. Raises
    UsageError when matplotlib is missing or no step has a loss.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("matplotlib is not installed", do="pip install 'autoglm-elastic[plot]'") from error
    chain = [metric for metric in lineage(steps) if metric.loss is not None]
    if not chain:
        raise UsageError(
            "no step of this run has a loss", valid="job.commit(loss=...) in the training script"
        )

    figure = Figure(figsize=(10.5, 5.6), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    top, strip = figure.subplots(2, 1, sharex=True, height_ratios=[6, 1])
    _draw_loss(top, chain, [metric for metric in lineage(undisturbed) if metric.loss is not None])
    _mark_incidents(top, strip, report, chain)
    _mark_snapshots(top, report, chain)
    _draw_world(strip, report, chain)
    top.set_title(
        title or f"{report.run_id}: loss", loc="left", color=_INK, fontsize=13, fontweight="bold", pad=14
    )
    top.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=_INK)

    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, target)
    return target


def _losses(chain: Sequence[Metric]) -> list[float]:
    return [math.nan if metric.loss is None else metric.loss for metric in chain]


def _smoothed(losses: Sequence[float], span: int) -> list[float]:
    """The mean of each value and the `span - 1` before it: never of what came later."""
    return [statistics.fmean(losses[max(0, end - span) : end]) for end in range(1, len(losses) + 1)]


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(colors=_FAINT, labelcolor=_INK, labelsize=9)


def _draw_loss(axes: Axes, chain: Sequence[Metric], undisturbed: Sequence[Metric]) -> None:
    span = max(1, len(chain) // SMOOTHED_PARTS)
    mean = f", mean of {span} steps" if span > 1 else ""
    if undisturbed:
        axes.plot(
            [m.step for m in undisturbed],
            _smoothed(_losses(undisturbed), span),
            color=_UNDISTURBED,
            linewidth=5,
            alpha=0.55,
            label=f"undisturbed run, same seed{mean}",
            solid_capstyle="round",
        )
    if span > 1:
        axes.plot([m.step for m in chain], _losses(chain), color=_LOSS, linewidth=0.7, alpha=0.3)
    axes.plot(
        [m.step for m in chain],
        _smoothed(_losses(chain), span),
        color=_LOSS,
        linewidth=1.6,
        label=f"this run{mean}",
    )
    _plain(axes)
    axes.set_ylabel("loss", color=_INK)
    axes.grid(axis="y", color="#e5e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01, y=0.12)


def _mark_incidents(axes: Axes, strip: Axes, report: Report, chain: Sequence[Metric]) -> None:
    marks = [
        (
            item.from_step if item.from_step is not None else chain[-1].step,
            _INCIDENT,
            f"{shortened(item.reason, 44)}\n"
            + (f"back after {duration(item.seconds)}, " if item.closed else "not recovered, ")
            + ("steps lost unknown" if item.steps_lost is None else f"{count(item.steps_lost, 'step')} lost"),
        )
        for item in report.incidents
    ]
    marks += [
        (item.from_step, _GROWTH, f"grew to {item.world_after} workers\n0 steps lost")
        for item in report.changes
        if item.kind == "growth"
    ]
    many = len(marks) > LABELS_MAX
    for level, (step, color, label) in enumerate(sorted(marks)):
        for each in (axes, strip):
            each.axvline(step, color=color, linewidth=0.6 if many else 1.2, linestyle=(0, (4, 3)), zorder=3)
        if many:
            continue
        axes.annotate(
            label,
            xy=(step, 0.80 - 0.15 * (level % 3)),
            xycoords=("data", "axes fraction"),
            xytext=(6, 0),
            textcoords="offset points",
            color=color,
            fontsize=8.5,
            va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
            zorder=5,
        )
    if many:
        told = {_INCIDENT: "incident", _GROWTH: "growth"}
        for color, number in Counter(color for _, color, _ in marks).items():
            axes.plot(
                [], [], color=color, linewidth=1, linestyle=(0, (4, 3)), label=count(number, told[color])
            )


def _mark_snapshots(axes: Axes, report: Report, chain: Sequence[Metric]) -> None:
    means = _smoothed(_losses(chain), max(1, len(chain) // SMOOTHED_PARTS))
    loss = {metric.step: mean for metric, mean in zip(chain, means, strict=True)}
    committed = [note.step for note in report.snapshots if note.outcome == "committed"]
    steps = [step for step in committed if step in loss]
    if steps:
        axes.plot(
            steps,
            [loss[step] for step in steps],
            linestyle="none",
            marker="o",
            markersize=6,
            markerfacecolor="white",
            markeredgecolor=_INK,
            markeredgewidth=1.3,
            label="snapshot committed",
            zorder=4,
        )


def _draw_world(axes: Axes, report: Report, chain: Sequence[Metric]) -> None:
    worlds = {span.generation: span.world_size for span in report.spans}
    sizes = [worlds.get(metric.generation, metric.world_size) for metric in chain]
    axes.fill_between(
        [metric.step for metric in chain], sizes, step="pre", color=_WORLD, linewidth=0, alpha=0.8
    )
    _plain(axes)
    axes.set_ylim(0, max([*sizes, 1]) * 1.15)
    axes.set_yticks(sorted({0, *sizes}))
    axes.set_ylabel("workers", color=_INK)
    axes.set_xlabel("step", color=_INK)
