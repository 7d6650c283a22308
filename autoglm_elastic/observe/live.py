"""A running job on a terminal, or as plain lines elsewhere.

The log files are read as they grow, once a refresh; the refresh is the display's own (`REFRESH_S`), bounded,
and nothing of the job waits for it. May touch: the two files, a console. Must never: write to the run
directory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autoglm_elastic.core.lifecycle import TaskState
from autoglm_elastic.observe import events, metrics
from autoglm_elastic.observe.events import EVENTS_NAME, METRICS_NAME
from autoglm_elastic.observe.text import count
from autoglm_elastic.observe.view import Message, RunView

REFRESH_S: Final = 0.25
"""How often the files are looked at: an eye does not want more."""
READ_BYTES_MAX: Final = 1 << 20
"""At most so much of a file in one refresh; the rest comes with the next."""
MESSAGES_SHOWN: Final = 8

_COLORS: Final = {"info": "default", "good": "green", "bad": "red", "note": "cyan"}
_STATES: Final = {
    TaskState.INIT: "yellow",
    TaskState.RUNNING: "green",
    TaskState.CHECKPOINTING: "cyan",
    TaskState.RECOVERING: "yellow",
    TaskState.PAUSED: "blue",
    TaskState.FAILED: "red",
    TaskState.DONE: "green",
}
_BARS: Final = "▁▂▃▄▅▆▇█"


class Tail:
    """The whole lines that a growing file has got since the last look. A file that is not there yet has
    none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._offset = 0

    def lines(self) -> list[bytes]:
        """At most `READ_BYTES_MAX` of them; the rest comes with the next look."""
        data = self._next()
        self._offset += len(data)
        return data.splitlines()

    def pending(self) -> bool:
        """Whether `lines` would give some now."""
        return bool(self._next())

    def _next(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(READ_BYTES_MAX)
        except FileNotFoundError:
            return b""
        return data[: data.rfind(b"\n") + 1]


class Follower:
    """Feeds a `RunView` from the files of a run directory."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.view = RunView()
        self._events = Tail(Path(run_dir) / EVENTS_NAME)
        self._metrics = Tail(Path(run_dir) / METRICS_NAME)

    def refresh(self) -> list[Message]:
        """Read what is new; the messages that it is worth, oldest first."""
        messages: list[Message] = []
        for line in self._events.lines():
            record = events.parse_line(line)
            if record is not None:
                messages += self.view.on_event(record)
        for line in self._metrics.lines():
            metric = metrics.parse_line(line)
            if metric is not None:
                self.view.on_metric(metric)
        return messages

    def read_all(self) -> None:
        """Read up to the end of both files."""
        while self._events.pending() or self._metrics.pending():
            self.refresh()


class Display(Protocol):
    """Shows a view. A context manager, since a terminal must be given back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, view: RunView, new: Sequence[Message]) -> None:
        """Once a refresh: the view as it is, and the messages since the last time."""

    def say(self, text: str) -> None:
        """A line of the caller's own."""


def display(console: Console, *, title: str, steps: int | None, plain: bool) -> Display:
    """A live view on a terminal; plain lines elsewhere, and on request."""
    if plain or not console.is_terminal:
        return PlainDisplay(console, steps=steps)
    return LiveDisplay(console, title=title, steps=steps)


class PlainDisplay:
    """One line for every message, and one now and then for the step."""

    def __init__(self, console: Console, *, steps: int | None) -> None:
        self._console = console
        self._every = max(1, (steps or 200) // 12)
        self._steps = steps
        self._told = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, view: RunView, new: Sequence[Message]) -> None:
        for message in new:
            elapsed = message.wall_time - (view.started or message.wall_time)
            self._print(f"{elapsed:6.1f} s  {message.text}")
        if view.step >= self._told + self._every:
            self._told = view.step - view.step % self._every
            loss = "" if view.loss is None else f"  loss {view.loss:.4f}"
            of = f" of {self._steps}" if self._steps else ""
            self._print(f"          step {view.step}{of}{loss}  {count(view.world_size, 'worker')}")

    def say(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveDisplay:
    """The rank table, the numbers and the newest messages, redrawn in place."""

    def __init__(self, console: Console, *, title: str, steps: int | None) -> None:
        self._title, self._steps = title, steps
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, view: RunView, new: Sequence[Message]) -> None:
        self._live.update(render(view, title=self._title, steps=self._steps), refresh=True)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


def render(view: RunView, *, title: str, steps: int | None) -> RenderableType:
    """The picture of a view."""
    state = view.tracker.job
    of = f" of {steps}" if steps else ""
    loss = "" if view.loss is None else f"   loss {view.loss:.4f}  "
    now = Table.grid(expand=True, padding=(0, 2, 0, 0))
    now.add_column(no_wrap=True)
    now.add_column(ratio=1)
    now.add_row(
        Text.assemble(
            (f"● {state.value}", _STATES[state]),
            f"   step {max(0, view.step)}{of}{loss}",
            (sparkline(list(view.losses)), "blue"),
        ),
        ProgressBar(total=steps, completed=max(0, view.step)) if steps else "",
    )
    recoveries = f"{view.recoveries} recover{'y' if view.recoveries == 1 else 'ies'}"
    so_far = Text(
        f"generation {view.generation}   {count(view.failures, 'failure')}   {recoveries}"
        f"   {count(view.steps_redone, 'step')} redone   {count(view.snapshots, 'snapshot')}",
        style="bright_black",
    )
    parts: list[RenderableType] = [now, so_far, "", _rank_table(view), "", _messages(view)]
    return Panel(Group(*parts), title=title, title_align="left", border_style="bright_black")


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """The last `width` values as a line of bars, from their lowest to their highest."""
    shown = list(values)[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in shown)


def _rank_table(view: RunView) -> Table:
    table = Table(box=None, expand=True, header_style="bright_black", padding=(0, 2, 0, 0))
    for column in ("rank", "state", "node", "pid", "started by"):
        table.add_column(column)
    for row in view.rows():
        table.add_row(
            str(row.rank),
            Text(row.state.value, style=_STATES[row.state]),
            row.node,
            str(row.pid or "-"),
            row.how or "-",
        )
    return table


def _messages(view: RunView) -> Table:
    table = Table(box=None, show_header=False, expand=True, padding=(0, 1, 0, 0))
    table.add_column(justify="right", style="bright_black", no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for message in list(view.messages)[-MESSAGES_SHOWN:]:
        elapsed = message.wall_time - (view.started or message.wall_time)
        table.add_row(f"{elapsed:.1f} s", Text(message.text, style=_COLORS[message.kind]))
    return table
