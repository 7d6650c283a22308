"""Many seeds in a row, and what a person reads of them: progress, the first failure whole, how to see it again.

Must not print: it yields lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from autoglm_elastic.errors import UsageError
from autoglm_elastic.sim.config import SimResult
from autoglm_elastic.sim.generate import random_config
from autoglm_elastic.sim.plants import PLANTS, planted
from autoglm_elastic.sim.simulation import run

NODES_DEFAULT: Final = 3
PROGRESS_SEEDS: Final = 500


class Campaign:
    """Runs `seeds` seeds from `first_seed` on, or until one breaks an invariant.

    Args:
        seeds: how many.
        first_seed: where to begin.
        nodes: the largest world that a seed may draw.
        plant: a bug to plant in the core, by its name in `sim.plants`.
        trace: yield every line of every simulation.

    Raises:
        UsageError: an unknown plant, or numbers that make no sense.

    After `lines()` has ended, `failed` is the result that broke an invariant, or None.
    """

    def __init__(
        self,
        *,
        seeds: int,
        first_seed: int = 0,
        nodes: int | None = None,
        plant: str | None = None,
        trace: bool = False,
    ) -> None:
        if plant is not None and plant not in PLANTS:
            raise UsageError(f"--plant {plant}", valid=", ".join(sorted(PLANTS)))
        if seeds < 1 or (nodes is not None and nodes < 1):
            raise UsageError(f"{seeds} seeds on {nodes} nodes", valid="at least one of each")
        self._seeds = range(first_seed, first_seed + seeds)
        self._nodes = NODES_DEFAULT if nodes is None else nodes
        self._plant = plant
        self._trace = trace
        self.failed: SimResult | None = None

    def lines(self) -> Iterator[str]:
        core = planted(self._plant)
        counts: Counter[str] = Counter()
        ends: Counter[str] = Counter()
        events = 0
        for done, seed in enumerate(self._seeds, start=1):
            result = run(seed, random_config(seed, nodes=self._nodes), core)
            counts.update(result.counts)
            ends[result.end] += 1
            events += result.events
            if self._trace and result.ok:
                yield from result.trace
            if result.violation is not None:
                self.failed = result
                yield from result.trace
                yield f"seed {seed} broke {result.violation}"
                yield f"again: {self._replay(seed)}"
                return
            if done % PROGRESS_SEEDS == 0 and done < len(self._seeds):
                yield f"{done} of {len(self._seeds)} seeds, no invariant broken"
        told = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        how = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
        yield f"{len(self._seeds)} seeds, {events} events, no invariant broken; jobs: {how}; {told}"

    def _replay(self, seed: int) -> str:
        plant = f" --plant {self._plant}" if self._plant else ""
        nodes = f" --nodes {self._nodes}" if self._nodes != NODES_DEFAULT else ""
        return f"autoglm simulate --seed {seed}{nodes}{plant} --trace"
