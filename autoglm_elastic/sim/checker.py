"""The invariants of the design, checked on what actually happened: the one place that sees everything.

The actors report facts; what they believe is not asked. After every event that could make a visible snapshot
wrong, all visible snapshots are verified again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from autoglm_elastic.core import lineage, split
from autoglm_elastic.core.commit import Snapshot
from autoglm_elastic.core.lineage import EntryFact, GenerationRecord
from autoglm_elastic.core.membership import Broken, Effect, Event, Finished, Generation, LeaderState
from autoglm_elastic.core.split import Cursor
from autoglm_elastic.sim.config import SimConfig
from autoglm_elastic.sim.disk import SimDisk, State
from autoglm_elastic.sim.loop import Loop

START: Final = State(-1, -1, 1, 1, Cursor(0, 0, 0))
"""What a fresh job holds before its first step."""


def digest_after(state: State, generation: int, positions: Sequence[int]) -> int:
    """The tensors after one more step. A generation leaves its mark, as floating point does: branches can be
    told apart."""
    return hash((state.digest, generation, *positions))


def samples_after(samples: int, epoch: int, positions: Sequence[int]) -> int:
    """What was seen so far, whatever the world."""
    return hash((samples, epoch, *positions))


class Checker:
    """Raises (through `Loop.broke`) at the first invariant that does not hold."""

    def __init__(self, loop: Loop, disk: SimDisk, config: SimConfig) -> None:
        self._loop, self._disk, self._config = loop, disk, config
        self._samples = _undisturbed(config)
        self._truth: dict[tuple[int, int], int] = {}
        self._resumed: dict[int, State] = {}
        self._sealed_at: dict[int, float] = {}
        self._planned: set[int] = set()
        self._recorded_at: dict[int, float] = {}
        self._recording_at: dict[int, float] = {}
        self._visible_at: dict[str, float] = {}
        self._newest_sealed = -1
        self._died_at: dict[tuple[str, int], float] = {}
        self._sealed: dict[int, Generation] = {}

    def node_died(self, name: str, incarnation: int) -> None:
        """A node went down with all that was on it."""
        self._died_at[name, incarnation] = self._loop.now

    def sealed(self, generation: Generation) -> None:
        """A generation was written into the store."""
        if generation.number <= self._newest_sealed:
            self._loop.broke("I6", f"generation {generation.number} sealed after {self._newest_sealed}")
        if generation.number in self._recorded_at:
            self._loop.broke("I3", f"generation {generation.number} was recorded before it was sealed")
        self._newest_sealed = generation.number
        self._sealed[generation.number] = generation
        self._sealed_at[generation.number] = self._loop.now
        if generation.planned:
            self._planned.add(generation.number)

    def led(self, before: LeaderState, event: Event, after: LeaderState, effects: Sequence[Effect]) -> None:
        """The leader has made a step."""
        if after.restart_count > before.restart_count and not isinstance(event, Broken):
            self._loss_charged(before, after)
        if isinstance(event, Broken | Finished):
            current = before.generation
            if effects and (current is None or current.nodes_of(event.generation) is None):
                self._loop.broke("I6", f"news of generation {event.generation} moved the leader: {effects}")

    def _loss_charged(self, before: LeaderState, after: LeaderState) -> None:
        """A node that went down with the generation before was charged with it."""
        current = before.generation
        if current is None:
            return
        number = current.grown_from[0][0] if current.grown_from else current.number
        if number not in self._sealed:
            return  # not in the store yet
        broken = self._sealed.get(self._sealed[number].parent)
        if broken is None or broken.restart_count == self._sealed[number].restart_count:
            return  # nothing was charged when that broke
        lost = before.working() - after.working()
        were_there = {(place.node, place.incarnation) for place in broken.placements}
        charged = {(place.node, place.incarnation) for place in current.placements if place.node in lost}
        sealed_at, now = self._sealed_at[number], self._loop.now
        if charged and all(
            node in were_there and self._died_at.get(node, now) < sealed_at for node in charged
        ):
            self._loop.broke(
                "I6", f"the loss of {sorted(lost)} was charged when generation {number} was sealed"
            )

    def recording(self, number: int) -> None:
        """A generation's record is on its way to the disk."""
        self._recording_at.setdefault(number, self._loop.now)

    def recorded(self, record: GenerationRecord) -> None:
        """A generation's record is durable: from now on it is part of the lineage, if it is the newest."""
        number, now = record.number, self._loop.now
        self._recorded_at[number] = now
        if number < max(self._recorded_at):
            return
        # What began to be recorded after the seal came too late, except that a planned world is sealed while its parent
        # runs.
        sealed_at = self._sealed_at.get(number, now)
        running = record.parent if number in self._planned else None
        before = [
            old
            for old in self._disk.records.values()
            if old.number < number and (self._recording_at[old.number] <= sealed_at or old.number == running)
        ]
        point = EntryFact("", record.resumed_step, record.parent)
        if record.parent >= 0:
            if (record.parent, record.resumed_step) not in self._truth:
                self._loop.broke("I3", f"generation {number} resumes from a state that never was: {record}")
            if not lineage.in_lineage(point, before):
                self._loop.broke("I3", f"generation {number} extends an abandoned line: {record}")
        visible = [fact for fact in self._disk.facts() if self._visible_at.get(fact.name, now) <= sealed_at]
        best = lineage.newest(visible, before) if before else None
        if best is not None and best.step > record.resumed_step:
            self._loop.broke(
                "I5", f"generation {number} resumes at {record.resumed_step}, {best.name} is lost"
            )

    def resumed(self, number: int, who: str, state: State) -> None:
        """A rank of generation `number` is about to train from `state`."""
        record = self._disk.records.get(number)
        if record is None:
            self._loop.broke("I6", f"{who} trains in generation {number}, which has no record")
            return
        first = self._resumed.setdefault(number, state)
        if (first.step, first.generation, first.digest) != (state.step, state.generation, state.digest):
            self._loop.broke(
                "I2", f"{who} starts generation {number} at {_at(state)}, another at {_at(first)}"
            )
        if (state.step, state.generation) != (record.resumed_step, record.parent):
            self._loop.broke("I2", f"{who} starts generation {number} at {_at(state)}, recorded is {record}")

    def reduced(self, number: int, states: Collection[State]) -> None:
        """The ranks of a generation have taken a step together."""
        if len({(state.step, state.digest) for state in states}) > 1:
            self._loop.broke(
                "I2", f"generation {number} reduces over {sorted({_at(state) for state in states})}"
            )

    def committed(self, number: int, who: str, state: State) -> None:
        """A rank has committed a step."""
        if self._truth.setdefault((number, state.step), state.digest) != state.digest:
            self._loop.broke("I3", f"{who}: step {state.step} of generation {number} has two outcomes")
        if state.samples != self._samples[state.step]:
            self._loop.broke(
                "I4", f"{who}: after step {state.step} the samples seen are not those of one world"
            )

    def after_event(self) -> None:
        if not self._disk.changed:
            return
        self._disk.changed = False
        for name, snapshot in self._disk.entries.items():
            self._visible(name, snapshot)

    def _visible(self, name: str, snapshot: Snapshot) -> None:
        known = name in self._visible_at
        self._visible_at.setdefault(name, self._loop.now)
        states = self._disk.read(name)
        if isinstance(states, str):
            self._loop.broke("I5" if known else "I1", states)
            return
        parts = len(self._disk.manifests[snapshot])
        packs = [self._disk.packs[pack] for pack in self._disk.manifests[snapshot]]
        if [pack.part for pack in packs] != list(range(parts)) or any(pack.parts != parts for pack in packs):
            self._loop.broke("I1", f"{name} does not consist of all its parts")
        if len({state.digest for state in states}) != 1 or any(
            (state.step, state.generation) != (snapshot.step, snapshot.generation) for state in states
        ):
            self._loop.broke("I2", f"{name} mixes {sorted({_at(state) for state in states})}")

    def failed(self, reason: str, live: int, spent: bool) -> None:
        """The job says it has failed, with `live` nodes there; `spent`: its restart budget is exhausted."""
        if not spent and live >= self._config.nodes_min:
            self._loop.broke("I8", f"failed although {live} nodes are there: {reason}")

    def done(self) -> None:
        """The job says it is done: the last step is committed, in the lineage."""
        last = self._config.steps - 1
        records = list(self._disk.records.values())
        if not any(
            step == last and lineage.in_lineage(EntryFact("", step, generation), records)
            for generation, step in self._truth
        ):
            self._loop.broke("I3", f"the job is done, but step {last} is not in the lineage")


def _undisturbed(config: SimConfig) -> list[int]:
    """`samples` after each step of a run in which nothing happened."""
    seen, samples, cursor = START.samples, [], START.cursor
    for _ in range(config.steps):
        start, stop = split.batch_at(cursor, config.dataset_size, config.batch, False)
        seen = samples_after(seen, cursor.epoch, range(start, stop))
        samples.append(seen)
        cursor = split.advance(cursor, config.dataset_size, config.batch, False)
    return samples


def _at(state: State) -> str:
    return f"step {state.step} of generation {state.generation} ({state.digest & 0xFFFF:04x})"
