"""The workers of this node, as one: put into a generation, replaced, stopped, and read.

May touch: the agent's processes and slots. Must never: decide about the job (the supervisor does, on what the
membership says) or speak to the store.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from autoglm_elastic import wire
from autoglm_elastic.agent.slots import WorkerSlot
from autoglm_elastic.core.membership import Failure, Generation, Placement
from autoglm_elastic.errors import ExitCode
from autoglm_elastic.observe import events

if TYPE_CHECKING:
    from autoglm_elastic.agent.agent import ElasticAgent

logger = logging.getLogger(__name__)


class NodeGroup:
    """`running`: there are processes, in `generation`, since `started_at` (monotonic seconds). `held`: they are out of
    every generation, and keep their state for the next one that counts on this node."""

    def __init__(self, agent: ElasticAgent, node: str) -> None:
        self.slots = agent.slots
        self.generation: Generation | None = None
        self.running = self.held = False
        self.started_at = 0.0
        self._agent = agent
        self._node = node
        self._planned = False
        self._asked_to_leave: wire.Stop | None = None

    @property
    def current(self) -> Generation:
        if self.generation is None:
            raise RuntimeError("no generation has been entered")
        return self.generation

    @property
    def can_stay(self) -> bool:
        """Everybody who is alive here runs `elastic.run` (and whoever died did)."""
        return all(slot.can_stay for slot in self.slots)

    @property
    def all_finished(self) -> bool:
        return all(slot.finished for slot in self.slots)

    @property
    def finished_in(self) -> int:
        """The oldest generation that a worker has ended well in; the current one where none says."""
        return min(
            (slot.done.generation for slot in self.slots if slot.done is not None),
            default=self.current.number,
        )

    def ended_well(self, slot: WorkerSlot) -> bool:
        """Whether its process has done its part: in the current generation, or in one that this only grew from."""
        if not slot.finished or slot.exit_code not in (ExitCode.DONE, ExitCode.REQUEUE):
            return False
        if slot.pending is None:
            return True
        return slot.done is not None and self.current.counts(self._node, slot.done.generation)

    @property
    def has_committed(self) -> bool:
        return any(slot.step_max >= 0 for slot in self.slots)

    @property
    def leaves_to_return(self) -> bool:
        """A worker has left on an agreed stop: the job wants to be started again."""
        return any(slot.done is not None and slot.done.requeue for slot in self.slots)

    def rank(self, slot: WorkerSlot) -> int:
        return int(self._agent.get_worker_group().workers[slot.local_rank].global_rank)

    def enter(
        self,
        generation: Generation,
        placement: Placement,
        where: tuple[Any, str, int],
        on_started: Callable[[], None],
    ) -> bool:
        """Put the workers into `generation`, whose c10d store is at `where`; whether they stayed. If they cannot, they
        are stopped and started anew; `on_started` is called when they have been."""
        stayed = self.running and self.can_stay
        if self.running and not stayed:
            self.stop(generation.reason)
        # A planned world is entered from its parent; whoever missed the parent has no boundary to agree on.
        previous = -1 if self.generation is None or self.held else self.generation.number
        self._planned = generation.planned and generation.parent == previous
        self.generation, self.held = generation, False
        self._agent.place(generation, placement, *where)
        if stayed:
            for slot in self.slots:
                self.move(slot)
        else:
            self._agent.start_all()
            on_started()
            self.running = True
            for slot in self.slots:
                self._begin(slot)
        self.started_at = time.monotonic()
        return stayed

    def move(self, slot: WorkerSlot) -> None:
        """One slot to the current generation: its process is told, or a new one is started."""
        if not slot.alive:
            self._agent.replace(slot)
            self._begin(slot)
            return
        world = self._send_world(slot)
        slot.pending = world
        if not world.planned:
            slot.unwind_deadline = time.monotonic() + self._agent.settings.recovery.unwind_limit_s

    def break_up(self, failure: Failure) -> None:
        """Tell whoever is still in the current generation that it is broken."""
        for slot in self.slots:
            if slot.alive and slot.pending is None:
                slot.send(wire.Break(self.current.number, str(failure)))

    @property
    def inside(self) -> list[WorkerSlot]:
        """Workers that may still take a step in a generation."""
        return [slot for slot in self.slots if slot.alive and slot.entered]

    def hold(self, reason: str) -> None:
        """Call everybody out of every generation sealed so far. Who has unwound keeps its state; see `inside` for who
        has not yet."""
        self.held = True
        for slot in self.slots:
            slot.pending = slot.unwind_deadline = None
            if slot.alive:
                slot.send(wire.Break(self.current.number, reason))

    def ask_to_leave(self, received: signal.Signals, limit_s: float) -> None:
        """The workers agree on a boundary, commit a snapshot there, and end; also those that are started from now
        on."""
        self._asked_to_leave = wire.Stop(int(received), limit_s)
        for slot in self.slots:
            slot.send(self._asked_to_leave)

    def kill_stuck(self, now: float) -> None:
        """Who has not unwound in time is blocked in C++: only a new process can take its place."""
        limit_s = self._agent.settings.recovery.unwind_limit_s
        for slot in self.slots:
            if not slot.alive or slot.unwind_deadline is None or now < slot.unwind_deadline:
                continue
            slot.unwind_deadline = None
            rank, number = self.rank(slot), self.current.number
            logger.warning("rank %d did not unwind within %.1f s: killing and replacing it", rank, limit_s)
            self._agent.emit(
                events.WorkerStuck(
                    rank=rank, node=self._node, pid=slot.pid, generation=number, waited_s=limit_s
                )
            )
            self._agent.kill(slot)

    def kill(self, slots: Iterable[WorkerSlot]) -> None:
        for slot in slots:
            if slot.alive:
                self._agent.kill(slot)

    def stop(self, reason: str) -> None:
        """Stop what runs; does nothing when nothing does."""
        if not self.running:
            return
        logger.info("stopping the workers of this node: %s", reason)
        self._agent.stop_all()
        self._forget()

    def stop_failed(self) -> dict[int, ProcessFailure]:
        """Stop the others of a group in which one has failed, as torch does; torch's record of who failed."""
        failures = dict(self._agent.group_result().failures)
        self._forget()
        return failures

    def stranded(self, slot: WorkerSlot, reason: str) -> Failure:
        """What is reported of a worker that lives and has lost a peer."""
        message = f"rank {self.rank(slot)} on node {self._node} lost a peer: {reason}"
        for other in self.slots:
            other.note()
        step = max(other.step_max for other in self.slots)
        return Failure(self._node, -1, -1, 0, message, step, time.time())

    def failure(self, slot: WorkerSlot) -> Failure:
        """What is reported of the death of a worker."""
        for other in self.slots:
            other.note()
        exit_code = slot.exit_code if slot.exit_code is not None else -int(signal.SIGKILL)
        if exit_code == ExitCode.DONE:
            message = "it exited before its training was over"
        else:
            error = self._agent.failure_of(slot).error_file_data.get("message", {})
            message = str(error.get("message", "")) if isinstance(error, dict) else ""
        return Failure(
            node=self._node,
            local_rank=slot.local_rank,
            rank=self.rank(slot),
            exit_code=exit_code,
            message=message,
            step=max(other.step_max for other in self.slots),
            wall_time=time.time(),
        )

    def _begin(self, slot: WorkerSlot) -> None:
        """A new process is told what the others know."""
        self._send_world(slot)
        if self._asked_to_leave is not None:
            slot.send(self._asked_to_leave)
        self._log_started(slot)

    def _send_world(self, slot: WorkerSlot) -> wire.World:
        generation = self.current
        group: Any = self._agent.get_worker_group()
        worker = group.workers[slot.local_rank]
        world = wire.World(
            generation=generation.number,
            parent=generation.parent,
            rank=worker.global_rank,
            world_size=worker.world_size,
            local_rank=slot.local_rank,
            local_world_size=len(self.slots),
            group_rank=group.group_rank,
            group_world_size=group.group_world_size,
            role_rank=worker.role_rank,
            role_world_size=worker.role_world_size,
            master_addr=group.master_addr,
            master_port=group.master_port,
            restart_count=generation.restart_count,
            planned=self._planned,
            reason=generation.reason,
        )
        slot.send(world)
        return world

    def _log_started(self, slot: WorkerSlot) -> None:
        self._agent.emit(
            events.WorkerStarted(
                rank=self.rank(slot),
                local_rank=slot.local_rank,
                node=self._node,
                pid=slot.pid,
                generation=self.current.number,
                how=self._agent.how_started(slot),
            )
        )

    def _forget(self) -> None:
        self.running = self.held = False
        for slot in self.slots:
            slot.note()
            slot.close()
            slot.pid = 0
            slot.exit_code = None
            slot.can_stay = slot.entered = False
            slot.pending = None
            slot.unwind_deadline = None
