"""A simulated worker: trains in the generation that its agent tells it, and recovers as production does.

It keeps its state when the world changes. An interrupted optimizer step leaves it torn: a state that is no
source for anybody. The order of a recovery is the one that `core` asks for: gather holdings, read, plan,
record, move state, train.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from autoglm_elastic.core import split
from autoglm_elastic.core.commit import Decision, VoteFrom
from autoglm_elastic.core.membership import Generation
from autoglm_elastic.core.recovery import Holding
from autoglm_elastic.sim.checker import digest_after, samples_after
from autoglm_elastic.sim.disk import State
from autoglm_elastic.sim.group import Contribution, Control, Group, Reduction
from autoglm_elastic.sim.loop import Actor
from autoglm_elastic.sim.recovering import Recovery
from autoglm_elastic.sim.saver import Saver

if TYPE_CHECKING:
    from autoglm_elastic.sim.agent import Agent
    from autoglm_elastic.sim.simulation import Simulation

TORN_S = 0.002
"""How long an optimizer step changes the state in place."""


class Worker(Actor):
    """One training process. `world`: the newest generation it has entered; `pending`: the one to enter at a
    boundary."""

    def __init__(self, sim: Simulation, agent: Agent, local: int) -> None:
        super().__init__(f"{agent.node.name}.{local}")
        self.sim: Simulation = sim
        self.agent: Agent = agent
        self.local = local
        self.state: State | None = None
        self.torn = False
        self.rank = -1
        self.world: Generation | None = None
        self.pending: Generation | None = None
        self.group: Group | None = None
        self.training = False
        self.done = False
        self.crash_in = 0
        self._called_off = -1
        self._saver: Saver | None = None
        self._recovery: Recovery | None = None

    def may_act(self) -> bool:
        """Whether it is still there to carry out its next effect: the place where crash-effect faults
        strike."""
        if self.alive and self.crash_in > 0:
            self.crash_in -= 1
            if self.crash_in == 0:
                self.sim.loop.trace(f"{self.name}: dies before its next effect")
                self.die()
        return self.alive

    def die(self) -> None:
        """Signal 9: peers find closed connections, the agent a dead child."""
        if not self.alive:
            return
        self.alive = False
        if self.group is not None:
            self.group.break_()
        self.agent.worker_died(self)

    def on_world(self, generation: Generation) -> None:
        """The agent's message. A planned world is entered at a boundary that all ranks agree on."""
        newest = max(world.number for world in (self.world, self.pending) if world) if self.world else -1
        if generation.number <= max(newest, self._called_off) or self.done:
            return
        if generation.planned and self.training:
            self.pending = generation
        else:
            self._enter(generation)

    def hold(self, number: int) -> None:
        """Out of every generation up to that one, with the state as it is."""
        self._called_off = number
        self.pending = None
        self._unwind()

    def _enter(self, generation: Generation) -> None:
        place = generation.placement(self.agent.node.name)
        if place is None:
            return
        self._unwind()
        self.world, self.pending = generation, None
        self.rank = place.base_rank + self.local
        self.group = self.sim.group(generation)
        self._saver = Saver(self, self.group, self.rank)
        self._recovery = Recovery(self, self.group, self.rank)
        self.group.join(self.rank, self, self._holding())

    def _unwind(self) -> None:
        """Out of the old group: whoever is still in it finds out."""
        group, self.group, self.training = self.group, None, False
        if group is not None:
            group.break_()
        if self._saver is not None:
            saver, self._saver = self._saver, None
            saver.peer_lost()

    def _holding(self) -> Holding:
        state = self.state
        if state is None:
            return Holding(self.rank, self.agent.node.name, -1, -1, False)
        shard = None if state.shard is None else f"{state.shard[0]}/{state.shard[1]}"
        complete = not self.torn
        return Holding(
            self.rank, self.agent.node.name, state.generation, state.step, complete, shard is not None, shard
        )

    def on_broken(self, group: Group) -> None:
        """A collective failed: unwind, keep the state, wait for the next world."""
        if self.group is not group:
            return
        self._unwind()
        if self.pending is not None:
            self._enter(self.pending)

    def on_gathered(self, group: Group) -> None:
        if self.group is group and self._recovery is not None:
            self._recovery.begin()

    def train_from(self, state: State) -> None:
        """The recovery is through: this is the state to train from."""
        if self.group is None:
            return
        self.state, self.torn, self.training = state, False, True
        self.sim.checker.resumed(self.group.number, self.name, state)
        self._start_step(self.group, state)

    def _start_step(self, group: Group, state: State) -> None:
        config, step = self.sim.config, state.step + 1
        if step >= config.steps:
            group.reduce(self.rank, config.steps, Contribution(state, ()))
            return
        if self.rank == 0 and self._saver is not None:
            snapshot = self._saver.decide(step)
            group.controls[step] = Control(snapshot, self.pending is not None)
        start, stop = split.batch_at(state.cursor, config.dataset_size, config.batch, False)
        first, last = group.share(self.sim.core.even, stop - start, self.rank)
        mine = Contribution(state, tuple(range(start + first, start + last)))
        self.sim.loop.soon(config.compute_s, self, self._contribute, group, step, mine)

    def _contribute(self, group: Group, step: int, mine: Contribution) -> None:
        if self.group is group:
            group.reduce(self.rank, step, mine)

    def on_reduced(self, group: Group, step: int, merged: Reduction) -> None:
        """The gradients are there (or, after the last step, everybody is): the step will be committed."""
        if self.group is not group or self.state is None:
            return
        self.sim.checker.reduced(group.number, merged.states)
        if step >= self.sim.config.steps:
            self._finish()
            return
        self.torn = True
        self.sim.loop.soon(TORN_S, self, self._commit, group, step, merged.positions)

    def _commit(self, group: Group, step: int, positions: tuple[int, ...]) -> None:
        before, config = self.state, self.sim.config
        if self.group is not group or before is None:
            return
        self.state = state = State(
            step,
            group.number,
            digest_after(before, group.number, positions),
            samples_after(before.samples, before.cursor.epoch, positions),
            self.sim.core.advance(before.cursor, config.dataset_size, config.batch, False),
            (self.rank, group.world_size) if config.sharded else None,
        )
        self.torn = False
        self.sim.checker.committed(group.number, self.name, state)
        self.agent.committed(step)
        if self.rank == 0:
            self.sim.loop.trace(f"{self.name}: step {step} committed in generation {group.number}")
        control = group.controls[step]
        if control.snapshot and self._saver is not None:
            self._saver.at_boundary(step)
        if self.alive and control.leave:
            self._leave()
        elif self.alive and self.group is group:
            self._start_step(group, state)

    def _leave(self) -> None:
        """In good order, at the agreed boundary."""
        self.group, self.training = None, False
        if self._saver is not None:
            saver, self._saver = self._saver, None
            saver.peer_lost()
        if self.pending is not None:
            self._enter(self.pending)

    def _finish(self) -> None:
        self.done, self.group, self.training = True, None, False
        self.agent.worker_done(self)

    def on_vote(self, group: Group, vote: VoteFrom) -> None:
        if self.group is group and self._saver is not None:
            self._saver.on_vote(vote)

    def on_decision(self, group: Group, decision: Decision) -> None:
        if self.group is group and self._saver is not None:
            self._saver.on_decision(decision)

    @property
    def recovery(self) -> Recovery | None:
        return self._recovery

    def resharded(self, state: State) -> State:
        """`state` as this rank holds its part of it."""
        if self.group is None or not self.sim.config.sharded:
            return replace(state, shard=None)
        return replace(state, shard=(self.rank, self.group.world_size))
