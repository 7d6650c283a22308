"""The agent's event loop under our own rendezvous: what happens to this node's workers, generation by
generation.

It waits, in one `select`, for the death of a worker (pidfd), its messages (control channel), news of the
membership (the session's descriptor) and signals. Decisions about the job as a whole are the leader's
(`core.membership`, driven by the session); here they are carried out for one node:

- A generation is sealed. Workers that can stay are told; empty slots are filled; otherwise the node's group
  restarts.
- A worker dies. If everybody else can stay, only its slot is filled anew, after the next generation is
  sealed; its peers are told at once to break their collectives. Otherwise the group stops, as under
  torchrun.
- A survivor does not unwind within its limit (stuck in C++): it is killed, and replaced in the generation
  it was sent to.
- A signal asks the job to leave: the workers agree on a boundary, commit a snapshot, and exit with code 75.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import time
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from autoglm_elastic import wire
from autoglm_elastic.agent._store_side import StoreSide
from autoglm_elastic.agent.rendezvous import AutoglmRendezvousHandler
from autoglm_elastic.agent.session import (
    Closed,
    LeaseLost,
    NotJoined,
    RunClosed,
    Sealed,
    StoreBack,
    StoreLost,
    Superseded,
    WaitTimeout,
)
from autoglm_elastic.agent.signals import STOP_SIGNALS, SignalInbox
from autoglm_elastic.agent.slots import WorkerSlot
from autoglm_elastic.core.membership import Failure, Generation
from autoglm_elastic.errors import ExitCode, PlatformError
from autoglm_elastic.observe import events
from autoglm_elastic.ports import StoreUnavailable

if TYPE_CHECKING:
    from autoglm_elastic.agent.agent import ElasticAgent

logger = logging.getLogger(__name__)

WAIT_S_MAX = 60.0
"""No event for this long: look around and wait again. Nothing depends on it."""


LEAVE_S_MAX = 10.0
"""How long workers may take to end once the job is done everywhere else."""


class Supervisor:
    """Runs the workers of `agent` through the generations of `handler`'s session until the job is over."""

    def __init__(self, agent: ElasticAgent, handler: AutoglmRendezvousHandler) -> None:
        self._agent = agent
        self._handler = handler
        self._session = handler.session
        self._slots = agent.slots
        self._generation: Generation | None = None
        self._reported_broken = -1
        self._reported_finished = -1
        self._started_at = 0.0
        self._planned = False
        self._store = StoreSide(agent.settings.store.lost_limit_s)
        self._failures: dict[int, ProcessFailure] = {}
        self._result: RunResult | None = None
        self._running = False
        self._stop_deadline: float | None = None
        self._finish_deadline: float | None = None
        self._leave_deadline: float | None = None
        self._stop_signal = signal.SIGTERM
        self._inbox = SignalInbox()

    def run(self) -> RunResult:
        """Until the job is done or has failed for good.

        Raises:
            SignalException: a signal that torch's agent would stop the workers for.
            PlatformError: this node lost its membership, or the job ended elsewhere.
        """
        with self._inbox:
            self._session.tell_progress(lambda: max(slot.newest_step() for slot in self._slots))
            self._session.join()
            while self._result is None:
                self._wait()
        return self._result

    def _wait(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._inbox, selectors.EVENT_READ)
            selector.register(self._session.events_fd, selectors.EVENT_READ)
            for local_rank, pidfd in self._agent.pidfds().items():
                if self._slots[local_rank].alive:
                    selector.register(pidfd, selectors.EVENT_READ)
            for slot in self._slots:
                if slot.control_fd >= 0:
                    selector.register(slot.control_fd, selectors.EVENT_READ)
            selector.select(self._seconds_to_deadline())
        for received in self._inbox.take():
            self._on_signal(received)
        for slot in self._slots:
            self._on_messages(slot)
        self._on_exits()
        for event in self._session.take_events():
            if isinstance(event, Sealed):
                self._on_sealed(event.generation)
            elif isinstance(event, Closed):
                self._on_closed(event)
            elif isinstance(event, LeaseLost):
                self._on_lease_lost(event)
            elif isinstance(event, StoreLost):
                self._store.lost(event)
            elif isinstance(event, StoreBack):
                self._store.back()
        self._on_deadlines()

    def _seconds_to_deadline(self) -> float:
        deadlines = [slot.unwind_deadline for slot in self._slots] + [
            self._stop_deadline,
            self._finish_deadline,
            self._store.deadline,
        ]
        due = min((deadline for deadline in deadlines if deadline is not None), default=None)
        return WAIT_S_MAX if due is None else min(WAIT_S_MAX, max(0.0, due - time.monotonic()))

    # Membership.

    def _on_sealed(self, generation: Generation) -> None:
        if self._generation is not None and generation.number <= self._generation.number:
            return
        placement = generation.placement(self._session.node)
        if placement is None:
            if self._running:
                self._stop_group(f"generation {generation.number} was sealed without this node")
            return
        try:
            store, addr, port = self._handler.enter(generation)
        except (Superseded, RunClosed, NotJoined, WaitTimeout, StoreUnavailable) as error:
            # A newer generation, the end of the run or the loss of our lease: the session's next event says which.
            logger.info("generation %d cannot be entered: %s", generation.number, error)
            return
        stayed = self._running and self._can_stay()
        if self._running and not stayed:
            self._stop_group(generation.reason)
        # A planned world is entered from its parent; whoever missed the parent has no boundary to agree on.
        previous = -1 if self._generation is None else self._generation.number
        self._planned = generation.planned and generation.parent == previous
        self._generation = generation
        self._agent.place(generation, placement, store, addr, port)
        if placement.group_rank == 0:
            self._agent.emit(
                events.GenerationSealed(
                    number=generation.number,
                    parent=generation.parent,
                    world_size=generation.world_size,
                    nodes=[member.node for member in generation.placements],
                    nprocs=[member.nproc for member in generation.placements],
                    planned=generation.planned,
                    reason=generation.reason,
                    restart_count=generation.restart_count,
                )
            )
        if stayed:
            for slot in self._slots:
                self._move(slot)
        else:
            self._agent.start_all()
            self._inbox.take_over(os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", ""))
            self._running = True
            for slot in self._slots:
                self._send_world(slot)
                self._log_started(slot)
            self._handler.settle()
        self._started_at = time.monotonic()
        self._store.tell(lambda: self._session.report_entered(generation.number))

    def _can_stay(self) -> bool:
        """Everybody who is alive here runs `elastic.run` (and whoever died did)."""
        return all(slot.can_stay for slot in self._slots)

    def _move(self, slot: WorkerSlot) -> None:
        """One slot to the generation just placed: its process is told, or a new one is started."""
        if not slot.alive:
            self._agent.replace(slot)
            self._send_world(slot)
            self._log_started(slot)
            return
        world = self._send_world(slot)
        slot.pending = world
        if not world.planned:
            slot.unwind_deadline = time.monotonic() + self._agent.settings.recovery.unwind_limit_s

    def _send_world(self, slot: WorkerSlot) -> wire.World:
        generation = self._current()
        worker = self._agent.get_worker_group().workers[slot.local_rank]
        group: Any = self._agent.get_worker_group()
        world = wire.World(
            generation=generation.number,
            parent=generation.parent,
            rank=worker.global_rank,
            world_size=worker.world_size,
            local_rank=slot.local_rank,
            local_world_size=len(self._slots),
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

    def _on_closed(self, event: Closed) -> None:
        if event.outcome == "done":
            if self._running and not self._all_finished() and any(slot.step_max >= 0 for slot in self._slots):
                # The others were a moment faster; ours are on their way out.
                self._leave_deadline = time.monotonic() + LEAVE_S_MAX
                return
            self._succeed()
            return
        if self._running:
            self._stop_group(event.reason)
        if not self._failures:
            raise PlatformError(f"the job has ended: {event.reason}")
        logger.error("%s", event.reason)
        self._result = RunResult(WorkerState.FAILED, failures=self._failures)

    def _succeed(self) -> None:
        """The job is done. Workers that are still here only waited for a world that will not come."""
        self._agent.requeue = any(slot.done is not None and slot.done.requeue for slot in self._slots)
        if self._running and not self._all_finished():
            self._stop_group("the job is done")
        ranks = [worker.global_rank for worker in self._agent.get_worker_group().workers]
        self._result = RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))

    def _give_up_store(self) -> None:
        """The store did not come back in time: leave, with a snapshot while there are workers that can take one."""
        error = self._store.give_up()
        if not self._running or not self._can_stay():
            if self._running:
                self._stop_group(str(error))
            raise error
        if self._all_finished():
            self._succeed()
        elif self._stop_deadline is None:
            self._ask_to_leave(signal.SIGTERM)

    def _on_lease_lost(self, event: LeaseLost) -> None:
        """Fence ourselves: nothing of this node may run on once others may think it dead."""
        for slot in self._slots:
            if slot.alive:
                self._agent.kill(slot)
        raise PlatformError(
            f"this node lost its membership: {event.reason}",
            do="start the same command again: it rejoins the job, or resumes it from the run directory",
        )

    # Workers.

    def _on_messages(self, slot: WorkerSlot) -> None:
        for message in slot.receive():
            if isinstance(message, wire.Hello):
                slot.can_stay = True
            elif isinstance(message, wire.Unwound):
                slot.unwind_deadline = None
            elif isinstance(message, wire.Entered):
                if slot.pending is not None and message.generation >= slot.pending.generation:
                    self._on_entered(slot)
            elif isinstance(message, wire.Done):
                slot.done = message
            elif isinstance(message, wire.Event):
                self._agent.emit_named(message.name, message.fields, rank=self._rank(slot))
            elif isinstance(message, wire.Resumed) and self._rank(slot) == 0:
                self._agent.emit(
                    events.IncidentClosed(
                        generation=message.generation,
                        parent=self._current().parent,
                        from_step=message.from_step,
                        step=message.step,
                        tier=message.tier,
                        reason=message.reason,
                        committed_wall_time=message.wall_time,
                        phases_s=message.phases_s,
                    )
                )

    def _on_entered(self, slot: WorkerSlot) -> None:
        """It takes part in the generation that it was sent to."""
        slot.pending = slot.unwind_deadline = None
        if not any(other.pending for other in self._slots):
            self._handler.settle()

    def _on_exits(self) -> None:
        if not self._running:
            return
        for local_rank, exit_code in self._agent.exits().items():
            slot = self._slots[local_rank]
            if not slot.alive or not self._running:
                continue
            self._on_messages(slot)
            slot.exit_code = exit_code
            slot.unwind_deadline = None
            slot.note()
            ended_well = slot.finished and exit_code in (ExitCode.DONE, ExitCode.REQUEUE)
            if slot.pending is not None or not ended_well:
                self._on_death(slot)
        if self._running and self._all_finished():
            if self._leave_deadline is None:
                self._finish()
            else:
                self._succeed()

    def _all_finished(self) -> bool:
        return all(slot.finished for slot in self._slots)

    def _finish(self) -> None:
        generation = self._current()
        if self._store.gave_up:
            self._succeed()
        elif self._reported_finished < generation.number:
            self._reported_finished = generation.number
            self._finish_deadline = time.monotonic() + self._agent.finish_timeout_s
            self._store.tell(lambda: self._session.report_finished(generation.number))

    def _on_death(self, slot: WorkerSlot) -> None:
        generation = self._current()
        failure = self._failure(slot)
        self._agent.emit(
            events.WorkerDied(
                rank=failure.rank,
                local_rank=slot.local_rank,
                node=failure.node,
                pid=slot.pid,
                generation=generation.number,
                exit_code=failure.exit_code,
                message=failure.message,
                step=slot.step_max,
            )
        )
        if slot.pending is not None:
            # It never entered the current generation, so nothing of that generation knows it: a new process
            # can.
            slot.pending = None
            self._move(slot)
            return
        if self._reported_broken < generation.number:
            self._failures = {}
        self._failures[failure.rank] = self._agent.failure_of(slot)
        if self._stop_deadline is not None or failure.exit_code == ExitCode.DO_NOT_RESTART:
            self._fail_for_good(failure)
            return
        in_place = self._can_stay()
        if in_place:
            for other in self._slots:
                if other.alive and other.pending is None:
                    other.send(wire.Break(generation.number, str(failure)))
        self._report_broken(generation, failure)
        if not in_place:
            result = self._agent.group_result()
            self._failures = dict(result.failures) or self._failures
            self._forget_group()

    def _failure(self, slot: WorkerSlot) -> Failure:
        for other in self._slots:
            other.note()
        exit_code = slot.exit_code if slot.exit_code is not None else -int(signal.SIGKILL)
        if exit_code == 0:
            message = "it exited before its training was over"
        else:
            error = self._agent.failure_of(slot).error_file_data.get("message", {})
            message = str(error.get("message", "")) if isinstance(error, dict) else ""
        return Failure(
            node=self._session.node,
            local_rank=slot.local_rank,
            rank=self._rank(slot),
            exit_code=exit_code,
            message=message,
            step=max(other.step_max for other in self._slots),
            wall_time=time.time(),
        )

    def _report_broken(self, generation: Generation, failure: Failure) -> None:
        if self._reported_broken >= generation.number:
            return
        self._reported_broken = generation.number
        self._agent.emit(
            events.IncidentOpened(
                id=generation.number, reason=str(failure), node=failure.node, rank=failure.rank
            )
        )
        alive_s = time.monotonic() - self._started_at
        self._store.tell(lambda: self._session.report_broken(generation.number, failure, alive_s=alive_s))

    def _fail_for_good(self, failure: Failure) -> None:
        self._store.tell(lambda: self._session.close_run("failed", str(failure), failure))
        if self._running:
            self._stop_group(str(failure))
        self._result = RunResult(WorkerState.FAILED, failures=self._failures)

    def _stop_group(self, reason: str) -> None:
        logger.info("stopping the workers of this node: %s", reason)
        self._agent.stop_all()
        self._forget_group()

    def _forget_group(self) -> None:
        self._running = False
        for slot in self._slots:
            slot.note()
            slot.close()
            slot.pid = 0
            slot.exit_code = None
            slot.can_stay = False
            slot.pending = None
            slot.unwind_deadline = None

    # Deadlines and signals.

    def _on_deadlines(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if slot.alive and slot.unwind_deadline is not None and now >= slot.unwind_deadline:
                slot.unwind_deadline = None
                limit = self._agent.settings.recovery.unwind_limit_s
                logger.warning(
                    "rank %d did not unwind within %.1f s: killing and replacing it", self._rank(slot), limit
                )
                self._agent.emit(
                    events.WorkerStuck(
                        rank=self._rank(slot),
                        node=self._session.node,
                        pid=slot.pid,
                        generation=self._current().number,
                        waited_s=limit,
                    )
                )
                self._agent.kill(slot)
        if self._store.deadline is not None and now >= self._store.deadline and self._result is None:
            self._give_up_store()
        if self._stop_deadline is not None and now >= self._stop_deadline:
            raise SignalException("the workers did not leave in time", self._stop_signal)
        if self._finish_deadline is not None and now >= self._finish_deadline and self._result is None:
            logger.warning("the other nodes did not finish within %.0f s", self._agent.finish_timeout_s)
            self._succeed()
        if self._leave_deadline is not None and self._result is None and now >= self._leave_deadline:
            self._succeed()

    def _on_signal(self, received: signal.Signals) -> None:
        graceful = (
            self._running and self._can_stay() and received in STOP_SIGNALS and self._stop_deadline is None
        )
        if not graceful:
            raise SignalException(f"got signal {received.name}", received)
        self._ask_to_leave(received)

    def _ask_to_leave(self, received: signal.Signals) -> None:
        """The workers agree on a boundary, commit a snapshot there, and end."""
        self._stop_signal = received
        self._stop_deadline = time.monotonic() + self._agent.stop_timeout_s
        for slot in self._slots:
            slot.send(wire.Stop(int(received), self._agent.stop_timeout_s))

    def _log_started(self, slot: WorkerSlot) -> None:
        self._agent.emit(
            events.WorkerStarted(
                rank=self._rank(slot),
                local_rank=slot.local_rank,
                node=self._session.node,
                pid=slot.pid,
                generation=self._current().number,
                how=self._agent.how_started(slot),
            )
        )

    def _rank(self, slot: WorkerSlot) -> int:
        return int(self._agent.get_worker_group().workers[slot.local_rank].global_rank)

    def _current(self) -> Generation:
        if self._generation is None:
            raise RuntimeError("no generation has been entered")
        return self._generation
