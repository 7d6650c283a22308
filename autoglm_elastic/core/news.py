"""What the leader hears and what it orders: the events and effects of `membership`, and its policy.

Times are seconds of the leader's own monotonic clock; only differences mean anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoglm_elastic.core.failure import Failure
from autoglm_elastic.core.generation import Generation, Member


@dataclass(frozen=True, slots=True)
class Policy:
    """`join_window_s`: how long the first round waits for more nodes once there are enough. `join_timeout_s`:
    how long too few nodes are waited for. `max_restarts`, `max_failures`, `progress_s`: see `core.budget`."""

    nodes_min: int
    nodes_max: int
    max_restarts: int
    join_window_s: float
    join_timeout_s: float
    progress_s: float
    max_failures: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.nodes_min <= self.nodes_max:
            raise ValueError(f"nodes {self.nodes_min}:{self.nodes_max}; valid: 1 <= min <= max")


@dataclass(frozen=True, slots=True)
class MemberUp:
    member: Member
    now: float


@dataclass(frozen=True, slots=True)
class MemberDown:
    """A node's lease ended. `step`: the newest committed step the leader knows of (-1: none). `incarnation`:
    of the member that went, if known: a newer one of the same node stays."""

    node: str
    now: float
    step: int = -1
    incarnation: int | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """A worker of `node` died in `generation`, which had run for `alive_s` seconds."""

    node: str
    generation: int
    failure: Failure
    now: float
    alive_s: float


@dataclass(frozen=True, slots=True)
class Entered:
    """`node` has seen `generation` and put its workers into it: it was alive after that was sealed."""

    node: str
    generation: int
    now: float


@dataclass(frozen=True, slots=True)
class Finished:
    """All workers of `node` ended well in `generation`."""

    node: str
    generation: int
    now: float


@dataclass(frozen=True, slots=True)
class Tick:
    now: float


@dataclass(frozen=True, slots=True)
class Adopted:
    """A new leader found this generation sealed by an earlier one. `inside`: its own node works in it."""

    generation: Generation
    now: float
    inside: bool = True


@dataclass(frozen=True, slots=True)
class Seal:
    generation: Generation


@dataclass(frozen=True, slots=True)
class FailJob:
    reason: str
    first_failure: Failure | None


@dataclass(frozen=True, slots=True)
class FinishJob:
    pass


@dataclass(frozen=True, slots=True)
class WakeAt:
    time: float


Event = MemberUp | MemberDown | Broken | Entered | Finished | Tick | Adopted
Effect = Seal | FailJob | FinishJob | WakeAt
