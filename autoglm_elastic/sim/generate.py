"""What a seed draws: a world, how bad its network and disk are, and the faults that strike it."""

from __future__ import annotations

import random
from typing import Final

from autoglm_elastic.sim.config import Fault, SimConfig

FAULTS_MAX: Final = 6
SLEEPERS: Final = 0.1
"""The share of seeds that try the fence: two faults that chance alone seldom brings together."""

FAULTS_UNTIL_S: Final = 20.0
"""Faults come while the job runs; then it is left alone and must end (I8)."""

KINDS: Final = (
    "kill-worker",
    "kill-worker",
    "kill-node",
    "crash-effect",
    "crash-effect",
    "pause-worker",
    "pause-agent",
    "pause-node",
    "cut-node",
)


GAPS: Final = (
    "committed in generation",
    "committed in generation",
    "disk: manifest",
    "disk: manifest",
    "put entry",
    "disk: entry",
    "abort: ",
    "plans: ",
    "disk: record",
    "seals generation",
    ": leads",
)
"""Lines of the trace after which a fault may strike: what follows them has not happened yet."""


def random_config(seed: int, *, nodes: int = 3) -> SimConfig:
    """A configuration that is a function of the seed alone. `nodes` is the largest world drawn."""
    draw = random.Random(f"config {seed}")  # noqa: S311  a simulation must be repeatable, not secret
    count = draw.randint(1, nodes)
    names = [chr(ord("a") + index) if count <= 26 else f"n{index}" for index in range(count)]
    nodes_min = draw.randint(1, count)
    workers = draw.choice((1, 1, 2, 3))
    faults = tuple(_fault(draw, names, workers) for _ in range(draw.randint(0, FAULTS_MAX)))
    if draw.random() < SLEEPERS:
        faults = _sleeper(draw)
    return SimConfig(
        nodes=count,
        nodes_min=nodes_min,
        nodes_max=draw.choice((count, count, max(nodes_min, count - 1), count + 1)),
        workers=workers,
        steps=draw.choice((6, 10, 14)),
        snapshot_every=draw.choice((1, 2, 3, 5)),
        sharded=draw.random() < 0.35,
        max_restarts=draw.choice((1, 2)) if draw.random() < 0.1 else 1000,
        lost_message=draw.choice((0.0, 0.0, 0.0, 0.05, 0.3)),
        repeated_message=draw.choice((0.0, 0.1)),
        unknown=draw.choice((0.0, 0.0, 0.05, 0.3)),
        write_failure=draw.choice((0.0, 0.0, 0.0, 0.05, 0.1, 1.0)),
        faults=faults,
    )


def _sleeper(draw: random.Random) -> tuple[Fault, ...]:
    """A coordinator sleeps through the end of its generation right before its entry; then the others need one."""
    nth = draw.randint(1, 3)
    asleep_s = round(draw.uniform(3.2, 8.0), 3)
    return (
        Fault("pause-node", "rank0", when="disk: manifest", nth=nth, duration_s=asleep_s),
        Fault("kill-worker", "rank0", when="disk: entry", nth=nth),
    )


def _fault(draw: random.Random, names: list[str], workers: int) -> Fault:
    """Half of the faults strike in the gap right after a step of a protocol, the others at any time."""
    kind, target = draw.choice(KINDS), f"{draw.choice(names)}.{draw.randrange(workers)}"
    duration_s = round(draw.uniform(3.0, 12.0) if draw.random() < 0.6 else draw.uniform(0.1, 3.0), 3)
    effects = draw.randint(1, 8)
    if draw.random() < 0.4:
        target = "rank0"
    if draw.random() < 0.5:
        at_s = round(draw.uniform(0.0, FAULTS_UNTIL_S), 3)
        return Fault(kind, target, at_s=at_s, duration_s=duration_s, effects=effects)
    when, nth = draw.choice(GAPS), draw.randint(1, 4)
    return Fault(kind, target, when=when, nth=nth, duration_s=duration_s, effects=effects)
