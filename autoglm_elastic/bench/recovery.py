"""`autoglm bench recovery`: what the death of a worker costs, under torchrun and under autoglm-run.

The same training, killed again and again in every mode; the modes take turns, so that whatever else the
machine does falls on all of them. A job that makes no new step for a minute is counted as hung, killed and
started again.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from autoglm_elastic.bench import machine, report
from autoglm_elastic.bench.jobs import MODES, Mode, modes_named
from autoglm_elastic.bench.kills import SAVE_EVERY, Kill, Stuck, Trial
from autoglm_elastic.bench.starts import Start, measure

WORKERS: Final = 2
START_WORKERS: Final = 4
KILLS_PER_ROUND: Final = 5
STARTS_AGAIN_MAX: Final = 3
"""A job that does not even start so often in a row ends the benchmark: something else is wrong."""
SEED: Final = 20
OUT: Final = Path("runs/bench-recovery")

Say = Callable[[str], None]


def main(
    kills: int = 20,
    modes: list[str] | None = None,
    out: Path = OUT,
    *,
    starts: int = 5,
    quick: bool = False,
    width: int | None = None,
) -> int:
    """Kill a worker `kills` times in each mode, start a job `starts` times under each launcher; print and
    write `results.json`, `results.md` and `recovery.png` into `out`.

    Args:
        modes: names from `jobs.MODES`; all of them by default.
        quick: three kills and one start each: shows that it works, proves nothing.
        width: of the MLP; the default has 10 million parameters.

    Returns 0. Raises UsageError for an unknown mode, Stuck when a job does not start at all.
    """
    chosen = modes_named(modes)
    if quick:
        kills, starts = min(kills, 3), min(starts, 1)
    launchers = [MODES[name] for name in ("torchrun", "unmodified") if MODES[name] in chosen]
    console = Console()
    with _progress(kills * len(chosen) + starts * len(launchers)) as (say, advance):
        killed = _kill(chosen, kills, width, say, advance)
        started = _start(launchers, starts, width, say, advance)
    results = report.Results(machine.describe(), killed, started)
    report.write(results, out)
    report.show(results, console)
    console.print(f"written to {out}: results.json, results.md, recovery.png", soft_wrap=True)
    return 0


def _kill(
    modes: list[Mode], kills: int, width: int | None, say: Say, advance: Callable[[], None]
) -> list[Kill]:
    dice = random.Random(SEED)  # noqa: S311  (whom to kill when, not a secret)
    positions = dice.sample(range(SAVE_EVERY), SAVE_EVERY)
    results: list[Kill] = []
    for first in range(0, kills, KILLS_PER_ROUND):
        for mode in modes:
            last = min(first + KILLS_PER_ROUND, kills)
            number = first
            while number < last:
                trial = _started(mode, dice, width, say)
                try:
                    while number < last:
                        position = positions[number % SAVE_EVERY]
                        result = _once(trial, position, say)
                        results.append(result)
                        number += 1
                        advance()
                        if result.hung:
                            break
                finally:
                    trial.stop()
    return results


def _started(mode: Mode, dice: random.Random, width: int | None, say: Say) -> Trial:
    for attempt in range(1, STARTS_AGAIN_MAX + 1):
        say(f"{mode.title}: starting {WORKERS} workers")
        try:
            return Trial(mode, WORKERS, dice, width=width)
        except Stuck as stuck:
            say(str(stuck))
            if attempt == STARTS_AGAIN_MAX:
                raise
    raise Stuck(mode.title)


def _once(trial: Trial, position: int, say: Say) -> Kill:
    try:
        kill = trial.kill(position)
    except Stuck as stuck:
        say(str(stuck))
        return Kill(trial.job.mode.name, None, None, None, 0, 0, (), "hung")
    if kill.back_s is None:
        say(trial.job.why())
    else:
        say(f"{trial.job.mode.title}: back after {kill.back_s:.3f} s, {kill.redone} steps redone")
    return kill


def _start(
    modes: list[Mode], starts: int, width: int | None, say: Say, advance: Callable[[], None]
) -> list[Start]:
    results: list[Start] = []
    for _ in range(starts):
        for mode in modes:
            start = measure(mode, START_WORKERS, width=width)
            results.append(start)
            say(f"{mode.title}: {START_WORKERS} workers, first step after {start.first_step_s:.2f} s")
            advance()
    return results


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Say, Callable[[], None]]]:
    """(say a line, one more is done): a bar on a terminal, plain lines elsewhere; on stderr."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("kills and starts", total=total)
        yield (
            lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
            lambda: progress.advance(task),
        )
