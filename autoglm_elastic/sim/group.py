"""The process group of one generation: who has joined, collectives, and how it breaks.

A collective is complete when every rank has contributed, but each rank hears of it on its own: so survivors
of a break can stand one step apart. When a member dies or leaves, the others find their connections closed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoglm_elastic.core.membership import Generation
from autoglm_elastic.core.recovery import Holding
from autoglm_elastic.sim.disk import State
from autoglm_elastic.sim.loop import Loop

if TYPE_CHECKING:
    from autoglm_elastic.sim.worker import Worker


@dataclass(frozen=True, slots=True)
class Contribution:
    """One rank's part of a step: where it stands, and the positions of its samples."""

    state: State
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Control:
    """What rank 0 decided for the boundary after a step; it travels with the step."""

    snapshot: bool
    leave: bool


@dataclass(frozen=True, slots=True)
class Reduction:
    """A step that every rank has contributed to. `states`: theirs; `positions`: the samples of all, by rank."""

    states: frozenset[State]
    positions: tuple[int, ...]


class Group:
    """Members by rank; a rank that left in good order (the job's end, an agreed boundary) breaks nothing."""

    def __init__(self, loop: Loop, generation: Generation) -> None:
        self._loop = loop
        self.generation = generation
        self.number = generation.number
        self.world_size = generation.world_size
        self.members: dict[int, Worker] = {}
        self.holdings: dict[int, Holding] = {}
        self.controls: dict[int, Control] = {}
        self.broken = False
        self._splits: dict[int, list[tuple[int, int]]] = {}
        self._reductions: dict[int, dict[int, Contribution]] = {}

    def join(self, rank: int, worker: Worker, holding: Holding) -> None:
        self.members[rank] = worker
        if self.broken:
            self._loop.soon(self._loop.config.message_s, worker, worker.on_broken, self)
        else:
            self._loop.soon(self._loop.config.message_s, None, self._gather, rank, holding)

    def _gather(self, rank: int, holding: Holding) -> None:
        self.holdings[rank] = holding
        if len(self.holdings) == self.world_size and not self.broken:
            first = self.members[0]
            self._loop.soon(self._loop.config.message_s, first, first.on_gathered, self)

    def reduce(self, rank: int, step: int, contribution: Contribution) -> None:
        if self.broken:
            return
        given = self._reductions.setdefault(step, {})
        given[rank] = contribution
        if len(given) == self.world_size:
            merged = Reduction(
                frozenset(given[rank].state for rank in range(self.world_size)),
                tuple(position for rank in range(self.world_size) for position in given[rank].positions),
            )
            self._reductions.pop(step)
            for worker in self.members.values():
                self._loop.soon(self._loop.config.message_s, worker, worker.on_reduced, self, step, merged)

    def share(
        self, even: Callable[[int, int], list[tuple[int, int]]], total: int, rank: int
    ) -> tuple[int, int]:
        """This rank's part of `total` samples; the split is made once."""
        if total not in self._splits:
            self._splits[total] = even(total, self.world_size)
        return self._splits[total][rank]

    def break_(self) -> None:
        """A member is gone: the others will notice."""
        if self.broken:
            return
        self.broken = True
        for worker in self.members.values():
            self._loop.soon(self._loop.config.message_s, worker, worker.on_broken, self)
