"""What the recovery benchmark found: as a table, as Markdown, as JSON, as a picture."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from autoglm_elastic.bench.jobs import MODES
from autoglm_elastic.bench.kills import HANG_S, Kill
from autoglm_elastic.bench.machine import sentence
from autoglm_elastic.bench.starts import Start
from autoglm_elastic.errors import PlatformError

Row = tuple[str, ...]

KILL_COLUMNS: Final = (
    "",
    "kills",
    "hangs",
    "new step",
    "worst",
    "steps redone",
    "full world",
    "new step, full world",
    "worst",
    "new process joins",
)
TICKS_S: Final = (0.05, 0.1, 0.3, 1, 3, 10, 30, HANG_S)
NONE: Final = "-"
START_COLUMNS: Final = ("4 workers", "starts", "command → first step", "worst", "memory (PSS)")


@dataclass(frozen=True, slots=True)
class Results:
    machine: dict[str, str]
    kills: Sequence[Kill]
    starts: Sequence[Start]


def _of(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def _median(values: Sequence[float]) -> str:
    return _seconds(statistics.median(values)) if values else NONE


def _worst(values: Sequence[float]) -> str:
    return _seconds(max(values)) if values else NONE


def kill_rows(kills: Sequence[Kill]) -> list[Row]:
    """One row a mode: medians and worst cases over the kills that the job came back from, and the hangs."""
    rows: list[Row] = []
    for mode in MODES.values():
        mine = [kill for kill in kills if kill.mode == mode.name]
        if not mine:
            continue
        new, back = _of(kill.new_step_s for kill in mine), _of(kill.back_s for kill in mine)
        redone = [kill.redone for kill in mine if not kill.hung]
        rows.append(
            (
                mode.title,
                str(len(mine)),
                str(sum(kill.hung for kill in mine)),
                _median(new),
                _worst(new),
                f"{statistics.median(redone):g}, at most {max(redone)}" if redone else NONE,
                _median(_of(kill.full_world_s for kill in mine)),
                _median(back),
                _worst(back),
                _median([age for kill in mine for age in kill.joined_s]),
            )
        )
    return rows


def start_rows(starts: Sequence[Start]) -> list[Row]:
    rows: list[Row] = []
    for mode in MODES.values():
        mine = [start for start in starts if start.mode == mode.name]
        if mine:
            seconds = [start.first_step_s for start in mine]
            pss = statistics.median(start.pss_bytes for start in mine) / 2**20
            rows.append((mode.title, str(len(mine)), _median(seconds), _worst(seconds), f"{pss:.0f} MiB"))
    return rows


def ratios(results: Results) -> list[str]:
    """Ours over torchrun's best, of the medians of this run."""

    def back(mode: str) -> float | None:
        values = _of(kill.back_s for kill in results.kills if kill.mode == mode)
        return statistics.median(values) if values else None

    lines = []
    best = min(_of((back("torchrun"), back("torchrun-own-store"))), default=None)
    for mode in ("unmodified", "elastic"):
        ours = back(mode)
        if best is not None and ours is not None:
            lines.append(
                f"{MODES[mode].title}: {ours / best:.3f} times torchrun's best, kill → new step at full world"
            )
    theirs = [start for start in results.starts if start.mode == "torchrun"]
    mine = [start for start in results.starts if start.mode == "unmodified"]
    if theirs and mine:
        seconds = _ratio([start.first_step_s for start in mine], [start.first_step_s for start in theirs])
        pss = _ratio([start.pss_bytes for start in mine], [start.pss_bytes for start in theirs])
        lines.append(
            f"4 workers, autoglm-run: {seconds:.2f} times torchrun's start, {pss:.2f} times its memory"
        )
    return lines


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(ours) / statistics.median(theirs)


def markdown(results: Results) -> str:
    """The tables as they stand in docs/benchmarks.md."""
    parts = [f"Machine: {sentence(results.machine)}."]
    if results.kills:
        parts.append(_markdown_table(KILL_COLUMNS, kill_rows(results.kills)))
    if results.starts:
        parts.append(_markdown_table(START_COLUMNS, start_rows(results.starts)))
    parts.append("\n".join(f"- {line}" for line in ratios(results)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(columns: Row, rows: list[Row]) -> str:
    rule = tuple("---" for _ in columns)
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))


def show(results: Results, console: Console) -> None:
    """Tables on a terminal, Markdown elsewhere."""
    if not console.is_terminal:
        console.print(markdown(results), markup=False, highlight=False, soft_wrap=True)
        return
    for columns, rows in (
        (KILL_COLUMNS, kill_rows(results.kills)),
        (START_COLUMNS, start_rows(results.starts)),
    ):
        if rows:
            table = Table(*columns)
            for row in rows:
                table.add_row(*row)
            console.print(table)
    for line in (*ratios(results), sentence(results.machine)):
        console.print(line, highlight=False)


def write(results: Results, folder: Path) -> None:
    """results.json, results.md, recovery.png. Raises PlatformError when the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(_plain(results), indent=1) + "\n")
        (folder / "results.md").write_text(markdown(results))
        if results.kills:
            draw(results, folder / "recovery.png")
    except OSError as error:
        raise PlatformError(
            f"could not write {folder}: {error.strerror}", do="name another with --out"
        ) from error


def _plain(results: Results) -> Any:
    return dataclasses.asdict(results)


def draw(results: Results, path: Path) -> None:
    """One dot a kill, on a logarithmic axis of seconds; the line is the median; a cross is a hang. Needs
    matplotlib (the extra `plot`); without it nothing is drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    modes = [
        mode for mode in reversed(MODES.values()) if any(kill.mode == mode.name for kill in results.kills)
    ]
    figure = Figure(figsize=(9, 1.2 + 0.75 * len(modes)), layout="constrained")
    axes = figure.subplots()
    for height, mode in enumerate(modes):
        mine = [kill for kill in results.kills if kill.mode == mode.name]
        back = _of(kill.back_s for kill in mine)
        colour = "tab:gray" if mode.launcher == "torchrun" else "tab:blue"
        spread = [height + 0.22 * ((index * 7) % 11 / 5 - 1) for index in range(len(back))]
        axes.scatter(back, spread, s=16, color=colour, alpha=0.6, linewidths=0)
        if back:
            median = statistics.median(back)
            axes.plot([median, median], [height - 0.34, height + 0.34], color=colour, linewidth=2)
            axes.annotate(_seconds(median), (median, height + 0.36), ha="center", va="bottom", fontsize=9)
        if hangs := sum(kill.hung for kill in mine):
            axes.scatter([HANG_S], [height], marker="x", s=60, color="tab:red")
            axes.annotate(f"{hangs} hung", (HANG_S, height + 0.36), ha="center", va="bottom", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(TICKS_S[0], HANG_S * 1.6)
    axes.set_xticks(TICKS_S, [f"{tick:g}" for tick in TICKS_S])
    axes.minorticks_off()
    axes.set_ylim(-0.6, len(modes) - 0.2)
    axes.set_yticks(range(len(modes)), [mode.title for mode in modes])
    axes.set_xlabel("seconds from SIGKILL of a worker to a new step done by the full world")
    axes.grid(axis="x", which="major", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=144)
