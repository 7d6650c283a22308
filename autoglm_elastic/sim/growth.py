"""What a recovery and a snapshot cost as a job grows: store operations, pushes to watchers, blobs, virtual time.

One story at any size: a job starts, commits a snapshot, loses a worker, loses a node, ends. Every delay is its mean, so
virtual time counts round trips and waits, one after another; that a store works off one request after another is not
in it. May touch: the simulator. Must never: ask a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from autoglm_elastic.errors import UsageError
from autoglm_elastic.sim.config import Fault, SimConfig
from autoglm_elastic.sim.core import Core
from autoglm_elastic.sim.simulation import Simulation

NODES_MIN: Final = 3
NODES_MAX: Final = 16_384
_EVENTS_MAX: Final = 1 << 26
"""Of the largest job many times over."""

_SNAPSHOT_STEP, _WORKER_STEP, _NODE_STEP, _STEPS = 2, 4, 6, 9


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one thing that happened. `pushes`: changes that the store hands to watchers, one a watcher. `blobs`: put into
    the run directory. `virtual_s`: without the step that the recovery ends with."""

    store_operations: int
    pushes: int
    blobs: int
    virtual_s: float


@dataclass(frozen=True, slots=True)
class Growth:
    """`start`: from nothing to the first step. `worker`, `node`: from its death to the next step; a node is missed when
    its lease has ended. `snapshot`: from the boundary to the commit."""

    nodes: int
    start: Cost
    snapshot: Cost
    worker: Cost
    node: Cost


def measure(nodes: int, core: Core | None = None) -> Growth:
    """Simulate a job on `nodes` nodes. Raises UsageError for a number that cannot be simulated."""
    if not NODES_MIN <= nodes <= NODES_MAX:
        raise UsageError(f"{nodes} nodes", valid=f"{NODES_MIN} to {NODES_MAX}")
    simulation = Simulation(0, _config(nodes), core or Core())
    recorder = _Recorder(simulation)
    result = simulation.run()
    if not result.ok or result.end != "done":
        raise RuntimeError(f"{nodes} nodes: {result.end}, {result.violation or result.end_reason}")
    return Growth(nodes, *(recorder.costs[name] for name in ("start", "snapshot", "worker", "node")))


def _config(nodes: int) -> SimConfig:
    victims = (1, 2) if nodes > len("abcdefghijklmnopqrstuvwxyz") else ("b", "c")
    worker, node = (f"n{each}" if isinstance(each, int) else each for each in victims)
    return SimConfig(
        nodes=nodes,
        nodes_max=nodes,
        workers=1,
        steps=_STEPS,
        snapshot_every=_SNAPSHOT_STEP + 1,
        dataset_size=_STEPS * nodes,
        batch=nodes,
        steady=True,
        lease_s=2.0,
        fence_s=1.5,
        faults=(
            Fault("kill-worker", f"{worker}.0", when=f"step {_WORKER_STEP} committed"),
            Fault("kill-node", node, when=f"step {_NODE_STEP} committed", duration_s=300.0),
        ),
        events_max=_EVENTS_MAX,
        queue_max=_EVENTS_MAX,
    )


class _Recorder:
    """Reads the counters at the lines of the trace between which something happened."""

    def __init__(self, simulation: Simulation) -> None:
        self.costs: dict[str, Cost] = {}
        self._simulation = simulation
        self._strike = simulation.loop.on_line
        self._begun: dict[str, tuple[int, int, int, float]] = {"start": self._counters()}
        simulation.loop.on_line = self._on_line

    def _on_line(self, line: str) -> None:
        if " committed in generation" in line:
            for name in ("start", "worker", "node"):
                self._end(name, without_s=self._simulation.config.compute_s)
        if f"step {_SNAPSHOT_STEP} committed" in line:
            self._begun["snapshot"] = self._counters()
        elif line.endswith("-g0 commit"):
            self._end("snapshot")
        elif line.startswith("fault: worker"):
            self._begun["worker"] = self._counters()
        elif line.startswith("fault: node"):
            self._begun["node"] = self._counters()
        if self._strike is not None:
            self._strike(line)

    def _end(self, name: str, *, without_s: float = 0.0) -> None:
        if name not in self._begun or name in self.costs:
            return
        now, before = self._counters(), self._begun[name]
        self.costs[name] = Cost(
            now[0] - before[0],
            now[1] - before[1],
            now[2] - before[2],
            round(now[3] - before[3] - without_s, 6),
        )

    def _counters(self) -> tuple[int, int, int, float]:
        store, disk = self._simulation.store, self._simulation.disk
        return store.operations, store.pushes, disk.writes, self._simulation.loop.now
