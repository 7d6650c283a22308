"""What a simulation is told and what it answers. Everything follows from a seed and a `SimConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `kind`: kill-worker, kill-node, pause-worker, pause-agent, pause-node, cut-node,
    crash-effect.

    `target` is a node, or node.local for a worker. It happens at `at_s`, or right after the `nth` line of the
    trace that contains `when`, which is how a scenario hits the gap between two effects. `duration_s`: how
    long a node is down, a process paused, a node cut off. `effects`: a crash-effect kills the worker before
    its n-th effect from then on.
    """

    kind: str
    target: str
    at_s: float = 0.0
    when: str = ""
    nth: int = 1
    duration_s: float = 0.0
    effects: int = 0


@dataclass(frozen=True, slots=True)
class SimConfig:
    """A job and a world for it. Times in virtual seconds, chances between 0 and 1.

    `steady`: every delay is its mean and no chance is ever taken, for scenarios that people read.
    """

    nodes: int = 3
    nodes_min: int = 1
    nodes_max: int = 3
    workers: int = 2
    steps: int = 14
    snapshot_every: int = 3
    dataset_size: int = 50
    batch: int = 12
    sharded: bool = False
    max_restarts: int = 1000
    steady: bool = False
    lost_message: float = 0.0
    repeated_message: float = 0.0
    unknown: float = 0.0
    write_failure: float = 0.0
    faults: tuple[Fault, ...] = ()
    message_s: float = 0.01
    slow: float = 0.03
    compute_s: float = 1.0
    write_s: float = 0.4
    fork_s: float = 0.05
    lease_s: float = 3.0
    fence_s: float = 2.0
    retry_s: float = 0.5
    phase_s: float = 4.0
    join_window_s: float = 1.0
    join_timeout_s: float = 60.0
    horizon_s: float = 400.0
    """By then the job must have ended: faults end long before (I8)."""
    events_max: int = 60_000
    queue_max: int = 2_000
    """Events under way at one time; more is a leak (I9)."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken invariant: `name` is I1 … I11 of the design, `crash` for a machine that raised."""

    name: str
    what: str
    at_s: float

    def __str__(self) -> str:
        return f"{self.name} at {self.at_s:.3f} s: {self.what}"


@dataclass(frozen=True, slots=True)
class SimResult:
    """`end`: done, failed (with `end_reason`) or stuck. Equal seeds and configurations give equal
    `trace_hash`es."""

    seed: int
    config: SimConfig
    end: str
    end_reason: str
    violation: Violation | None
    trace: tuple[str, ...]
    trace_hash: str
    events: int
    virtual_s: float
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.violation is None
