"""`autoglm bench restarts`: one job, a worker of it killed again and again, back `n` times in a row."""

from __future__ import annotations

import random
import statistics

from rich.console import Console

from autoglm_elastic.bench import machine
from autoglm_elastic.bench.jobs import modes_named
from autoglm_elastic.bench.kills import SAVE_EVERY, Stuck, Trial
from autoglm_elastic.bench.recovery import SEED, WORKERS


def main(n: int = 100, mode: str = "unmodified", *, width: int | None = None) -> int:
    """Kill a worker of one job `n` times. Returns 0 when it came back every time, 1 at the first hang.

    Args:
        mode: one name from `jobs.MODES`. Raises UsageError for another.
        width: of the MLP; the default has 10 million parameters.
    """
    (chosen,) = modes_named([mode])
    console = Console(highlight=False, markup=False, soft_wrap=True)
    seconds: list[float] = []
    try:
        dice = random.Random(SEED)  # noqa: S311  (not a secret)
        trial = Trial(chosen, WORKERS, dice, width=width)
        try:
            while len(seconds) < n:
                kill = trial.kill(dice.randrange(SAVE_EVERY))
                if kill.back_s is None:
                    raise Stuck(trial.job.why())
                seconds.append(kill.back_s)
                console.print(
                    f"{len(seconds)}/{n}: back after {kill.back_s:.3f} s, {kill.redone} steps redone"
                )
        finally:
            trial.stop()
    except Stuck as stuck:
        console.print(f"{chosen.title}: stuck after {len(seconds)} restarts: {stuck}")
        return 1
    middle, worst = statistics.median(seconds), max(seconds)
    console.print(
        f"{chosen.title}: {n} restarts in a row without a hang; kill to new step at full world: "
        f"median {middle:.3f} s, worst {worst:.3f} s"
    )
    console.print(machine.sentence(machine.describe()))
    return 0
