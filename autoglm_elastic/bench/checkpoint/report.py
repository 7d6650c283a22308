"""What was found: on a terminal, as Markdown, as JSON, as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table as RichTable

from autoglm_elastic.bench.checkpoint.spec import Options, Rows
from autoglm_elastic.bench.checkpoint.tables import Table, tables
from autoglm_elastic.bench.checkpoint.targets import judge
from autoglm_elastic.bench.machine import sentence
from autoglm_elastic.errors import PlatformError, UsageError


class Results(msgspec.Struct, frozen=True):
    machine: dict[str, str]
    options: Options
    parts: dict[str, Rows]


def setting(results: Results) -> str:
    """Where the numbers come from, in a sentence."""
    options = results.options
    return (
        f"Machine: {sentence(results.machine)}. State: {options.mib} MiB; medians of {options.repeat}; "
        f"OMP_NUM_THREADS={options.threads}."
    )


def markdown(results: Results) -> str:
    """The tables and targets as they stand in docs/benchmarks.md."""
    lines = [setting(results)]
    for table in tables(results.parts):
        lines += ["", f"**{table.title}**", "", _row(table.columns), _row(("---",) * len(table.columns))]
        lines += [_row(row) for row in table.rows]
    judged = judge(results.parts)
    if judged:
        lines += ["", _row(("target", "measured", "")), _row(("---",) * 3)]
    for target in judged:
        sign = "≤" if target.at_most else "≥"
        lines.append(_row((f"{target.what} {sign} {target.limit:g}", f"{target.ratio:.2f}", target.verdict)))
    return "\n".join(lines) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def show(results: Results, console: Console) -> None:
    """Tables on a terminal, Markdown elsewhere."""
    if not console.is_terminal:
        console.print(markdown(results), markup=False, highlight=False, soft_wrap=True)
        return
    for table in tables(results.parts):
        shown = RichTable(*table.columns, title=table.title)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for target in judge(results.parts):
        console.print(target.line, style="green" if target.met else "red", highlight=False)
    console.print(setting(results), highlight=False)


def write_json(results: Results, path: Path) -> None:
    """All samples, and the targets. Raises PlatformError."""
    told: dict[str, Any] = msgspec.to_builtins(results)
    told["targets"] = [
        {"what": one.what, "ratio": one.ratio, "limit": one.limit, "at_most": one.at_most, "met": one.met}
        for one in judge(results.parts)
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=1) + b"\n")
    except OSError as error:
        raise PlatformError(f"could not write {path}: {error.strerror}", do="name another file") from error


def read_json(path: Path) -> Results:
    """What `write_json` wrote. Raises UsageError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"{path}: {error}", valid="a file that --json wrote") from error


def draw(results: Results, folder: Path) -> list[str]:
    """A picture for each table. Needs matplotlib (the extra `plot`); without it nothing is drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    made = []
    for table in tables(results.parts):
        if any(panel.bars for panel in table.panels):
            _draw(table, folder / f"checkpoint_{table.name}.png")
            made.append(f"checkpoint_{table.name}.png")
    return made


def _draw(table: Table, path: Path) -> None:
    from matplotlib.figure import Figure

    panels = [panel for panel in table.panels if panel.bars]
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    height = max(len(panel.bars) for panel in panels) * 0.32 + 0.9
    figure = Figure(figsize=(6.2 * columns, height * rows), layout="constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        labels = [label for label, _ in panel.bars][::-1]
        values = [value for _, value in panel.bars][::-1]
        colours = [_colour(label) for label in labels]
        drawn = axes.barh(range(len(values)), values, color=colours)
        axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
        axes.set_yticks(range(len(values)), labels, fontsize=8)
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.margins(x=0.15)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.suptitle(table.title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _colour(label: str) -> str:
    if label.startswith("ours"):
        return "tab:orange"
    return "tab:green" if label.startswith(("limit", "memcpy", "write", "read")) else "tab:blue"
