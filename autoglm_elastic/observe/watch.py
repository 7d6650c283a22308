"""A status that is kept current: on a terminal in place, elsewhere a line for what has changed, or JSON lines.

May touch: a console, a `status.Source`. Must never: ask the source more often than it has news.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from autoglm_elastic.observe import status as room
from autoglm_elastic.observe.status import Source, Status
from autoglm_elastic.observe.text import count
from autoglm_elastic.observe.view import Incident

REDRAW_S_MIN: Final = 0.25
"""However fast news come: an eye does not want more."""

QUIET_S_MAX: Final = 30.0
"""Without news it is looked again after this: nothing depends on it."""

STEP_LINE_S: Final = 5.0
"""Between two lines that tell of nothing but steps, where the output is no terminal."""


def watch(source: Source, console: Console, *, as_json: bool) -> Status:
    """Until the job has ended, or the person interrupts. The last status."""
    if as_json:
        return _follow(source, _JsonLines(console).show)
    if not console.is_terminal:
        return _follow(source, _PlainLines(console).show)
    with Live(console=console, auto_refresh=False) as live:
        return _follow(source, lambda told: live.update(_picture(told), refresh=True))


def _follow(source: Source, show: Callable[[Status], None]) -> Status:
    pause = threading.Event()
    while True:
        told = source.status()
        show(told)
        if room.ended(told.state):
            return told
        pause.wait(REDRAW_S_MIN)
        source.wait(QUIET_S_MAX)


def _picture(told: Status) -> Panel:
    return Panel(Text("\n".join(room.lines(told))), title="autoglm status", title_align="left")


class _JsonLines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = b""

    def show(self, told: Status) -> None:
        line = msgspec.json.encode(told)
        if line != self._shown:
            self._shown = line
            self._console.out(line.decode(), highlight=False)


class _PlainLines:
    """A line for a new state, generation, snapshot or incident at once; for steps alone now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: Status | None = None
        self._told_at = 0.0

    def show(self, told: Status) -> None:
        before, now = self._shown, time.monotonic()
        quiet = told.step == (-1 if before is None else before.step) or now < self._told_at + STEP_LINE_S
        if quiet and before is not None and _gist(before) == _gist(told):
            return
        self._shown, self._told_at = told, now
        rate = "" if not told.steps_per_s else f", {told.steps_per_s:.3g} steps/s"
        loss = "" if told.loss is None else f", loss {told.loss:.4f}"
        held = "".join(f", {tier} {step}" for tier, step in told.newest_by_tier.items())
        world = f"generation {told.generation}, {count(told.world_size, 'worker')}"
        self._print(f"{told.state}, step {max(0, told.step)}{rate}{loss}; {world}{held}")
        known = set() if before is None else {_named(each) for each in before.incidents}
        for each in told.incidents:
            if _named(each) not in known:
                self._print(f"  {room.incident_line(each)}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _gist(told: Status) -> tuple[object, ...]:
    return told.state, told.generation, told.snapshot_step, [_named(each) for each in told.incidents]


def _named(incident: Incident) -> tuple[int, int | None]:
    return incident.broke, incident.generation
