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
import select
import selectors
import signal
import time
from typing import TYPE_CHECKING

from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from autoglm_elastic import wire
from autoglm_elastic.agent._fence import Fence
from autoglm_elastic.agent._group import NodeGroup
from autoglm_elastic.agent._notes import Notes
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

LAST_WORDS_S_MAX = 5.0
"""How long the end of an agent waits for a store that does not take what it has to tell."""

LEAVE_S_MAX = 10.0
"""How long workers may take to end once the job is done everywhere else."""


class Supervisor:
    """Runs the workers of `agent` through the generations of `handler`'s session until the job is over."""

    def __init__(self, agent: ElasticAgent, handler: AutoglmRendezvousHandler) -> None:
        self._agent = agent
        self._handler = handler
        self._session = handler.session
        self._slots = agent.slots
        self._group = NodeGroup(agent, handler.session.node)
        self._reported_broken = -1
        self._reported_finished = -1
        self._enter_again = False
        self._store = StoreSide(agent.settings.store.lost_limit_s)
        self._fence = Fence(
            agent,
            handler.session,
            self._group,
            limit_s=handler.store_lost_limit_s(agent.settings.store.lost_limit_s),
            read=self._on_messages,
        )
        self._failures: dict[int, ProcessFailure] = {}
        self._result: RunResult | None = None
        self._stop_deadline: float | None = None
        self._finish_deadline: float | None = None
        self._leave_deadline: float | None = None
        self._stop_signal = signal.SIGTERM
        self._inbox = SignalInbox()

    def run(self) -> RunResult:
        """Until the job is done or has failed for good.

        Raises:
            SignalException: a signal that torch's agent would stop the workers for.
            PlatformError: this node lost its membership for good, or the job ended elsewhere.
        """
        with self._inbox:
            self._session.tell_progress(lambda: max(slot.newest_step() for slot in self._slots))
            self._session.join()
            with Notes(self._session, self._slots, self._agent.recent):
                while self._result is None:
                    self._wait()
            self._tell_last_words()
        return self._result

    def _tell_last_words(self) -> None:
        """A few more attempts at what could not be told, unless the store is lost."""
        give_up_at = time.monotonic() + LAST_WORDS_S_MAX
        while self._store.retry_at is not None and time.monotonic() < give_up_at:
            pause_s = max(0.0, self._store.retry_at - time.monotonic())
            select.select([self._session.events_fd], [], [], pause_s)
            for event in self._session.take_events():
                if isinstance(event, StoreLost):
                    self._store.lost(event)
                    return
            if time.monotonic() >= self._store.retry_at:
                self._store.tell_again()

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
                self._enter_newest()
                self._fence.rejoin.nudge(time.monotonic())
        self._on_deadlines()

    def _seconds_to_deadline(self) -> float:
        deadlines = [slot.unwind_deadline for slot in self._slots] + [
            self._stop_deadline,
            self._finish_deadline,
            self._leave_deadline,
            self._store.deadline,
            self._store.retry_at,
            self._fence.rejoin.due,
        ]
        due = min((deadline for deadline in deadlines if deadline is not None), default=None)
        return WAIT_S_MAX if due is None else min(WAIT_S_MAX, max(0.0, due - time.monotonic()))

    # Membership.

    def _on_sealed(self, generation: Generation) -> None:
        known = self._group.generation
        if known is not None and generation.number <= known.number:
            return
        placement = generation.placement(self._session.node)
        if placement is None or placement.incarnation != self._session.incarnation:
            # It may count on what this node was before it lost its lease; of which we may not have heard yet.
            if not self._group.held:
                self._fence.call_off(f"generation {generation.number} was sealed without this node")
            return
        if self._has_finished_in(generation):
            return
        try:
            where = self._handler.enter(generation)
        except StoreUnavailable as error:
            logger.warning("generation %d cannot be entered yet: %s", generation.number, error)
            self._enter_again = True
            self._store.failed()
            return
        except (Superseded, RunClosed, NotJoined, WaitTimeout) as error:
            # A newer generation, the end of the run or the loss of our lease: the session's next event says which.
            logger.info("generation %d cannot be entered: %s", generation.number, error)
            return
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
        if not self._group.enter(generation, placement, where, self._take_signals_over):
            self._handler.settle()
        self._store.tell(lambda: self._session.report_entered(generation.number))

    def _enter_newest(self) -> None:
        """What the store did not let us enter."""
        again, self._enter_again = self._enter_again, False
        if again and (generation := self._session.generation()) is not None:
            self._on_sealed(generation)

    def _has_finished_in(self, generation: Generation) -> bool:
        """Whether all workers here have ended well before `generation`, which only grew from theirs, was seen: it comes
        too late for them, and the job ends in theirs."""
        if not self._group.running or not self._group.all_finished:
            return False
        return generation.counts(self._session.node, self._group.finished_in)

    def _take_signals_over(self) -> None:
        """Starting workers has set torch's own handlers."""
        self._inbox.take_over(os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", ""))

    def _on_closed(self, event: Closed) -> None:
        if event.outcome == "done":
            if self._group.running and not self._group.all_finished and self._group.has_committed:
                # The others were a moment faster; ours are on their way out.
                self._leave_deadline = time.monotonic() + LEAVE_S_MAX
                return
            self._succeed()
            return
        self._group.stop(event.reason)
        if not self._failures:
            raise PlatformError(f"the job has ended: {event.reason}")
        logger.error("%s", event.reason)
        self._result = RunResult(WorkerState.FAILED, failures=self._failures)

    def _succeed(self) -> None:
        """The job is done. Workers that are still here only waited for a world that will not come."""
        self._agent.requeue = self._group.leaves_to_return
        if not self._group.all_finished:
            # Ours did not see the end: the others know which it was.
            self._agent.requeue = self._agent.requeue or self._session.returns()
            self._group.stop("the job is done")
        ranks = [worker.global_rank for worker in self._agent.get_worker_group().workers]
        self._result = RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))

    def _give_up_store(self) -> None:
        """The store did not come back in time: leave, with a snapshot while there are workers that can take one."""
        error = self._store.give_up()
        if not self._group.running or not self._group.can_stay:
            self._group.stop(str(error))
            raise error
        if self._group.all_finished:
            self._succeed()
        elif self._stop_deadline is None:
            self._ask_to_leave(signal.SIGTERM)

    def _on_lease_lost(self, event: LeaseLost) -> None:
        """Fence ourselves: nothing of this node may train on once others may think it dead. Then come back as a new
        member, with the state that the workers hold: whether it is still of the lineage, the next plan sees."""
        if self._stop_deadline is not None and any(slot.done for slot in self._slots):
            # All ranks have left as agreed: ours are on their way out.
            self._leave_deadline = time.monotonic() + LEAVE_S_MAX
            self._tell_finished(self._group.finished_in)
            return
        self._fence.call_off(event.reason, at_once=True)
        if self._session.outcome() is not None:
            return
        self._finish_deadline = None
        self._store.forget()
        self._fence.lost(event.reason)

    # Workers.

    def _on_messages(self, slot: WorkerSlot) -> None:
        for message in slot.receive():
            if isinstance(message, wire.Hello):
                slot.can_stay = True
            elif isinstance(message, wire.Unwound):
                slot.unwind_deadline, slot.entered = None, False
            elif isinstance(message, wire.Entered):
                slot.entered = True
                if slot.pending is not None and message.generation >= slot.pending.generation:
                    self._on_entered(slot)
            elif isinstance(message, wire.Stranded):
                self._on_stranded(slot, message)
            elif isinstance(message, wire.Done):
                slot.done = message
            elif isinstance(message, wire.Event):
                self._agent.emit_named(message.name, message.fields, rank=self._group.rank(slot))
            elif isinstance(message, wire.Resumed) and self._group.rank(slot) == 0:
                self._agent.emit(
                    events.IncidentClosed(
                        generation=message.generation,
                        parent=self._group.current.parent,
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

    def _on_stranded(self, slot: WorkerSlot, message: wire.Stranded) -> None:
        """It has lost a connection, but nobody seems to have died: the generation is broken nevertheless."""
        if not self._group.running or self._group.held or slot.pending is not None:
            return
        generation = self._group.current
        if message.generation == generation.number and self._reported_broken < generation.number:
            failure = self._group.stranded(slot, message.reason)
            self._group.break_up(failure)
            self._report_broken(generation, failure)

    def _on_exits(self) -> None:
        if not self._group.running:
            return
        for local_rank, exit_code in self._agent.exits().items():
            slot = self._slots[local_rank]
            if not slot.alive or not self._group.running:
                continue
            self._on_messages(slot)
            slot.exit_code = exit_code
            slot.unwind_deadline = None
            slot.note()
            if self._group.ended_well(slot):
                slot.pending = None
            else:
                self._on_death(slot)
        if self._group.running and self._group.all_finished and not self._group.held:
            if self._leave_deadline is None:
                self._finish()
            else:
                self._succeed()

    def _finish(self) -> None:
        number = self._group.finished_in
        if self._store.gave_up:
            self._succeed()
        elif self._reported_finished < number:
            self._finish_deadline = time.monotonic() + self._agent.finish_timeout_s
            self._tell_finished(number)

    def _tell_finished(self, number: int) -> None:
        self._reported_finished = number
        self._store.tell(lambda: self._session.report_finished(number, returns=self._group.leaves_to_return))

    def _on_death(self, slot: WorkerSlot) -> None:
        generation = self._group.current
        failure = self._group.failure(slot)
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
        without_world = self._stop_deadline is not None and failure.exit_code == 128 + self._stop_signal
        if self._group.held and not without_world:
            return  # the next generation gets a new process here
        if slot.pending is not None:
            slot.pending = None
            if not any(other.finished for other in self._slots):
                # It never entered the current generation, so nothing of that generation knows it: a new process
                # can.
                self._group.move(slot)
                return
            # Who has finished will not be in it either: only the next one can be whole.
        if self._reported_broken < generation.number:
            self._failures = {}
        self._failures[failure.rank] = self._agent.failure_of(slot)
        if failure.exit_code == ExitCode.DO_NOT_RESTART:
            self._fail_for_good(failure)
            return
        if without_world:
            raise SignalException("the workers had no world to agree on a stop in", self._stop_signal)
        in_place = self._group.can_stay
        if in_place:
            self._group.break_up(failure)
        self._report_broken(generation, failure)
        if not in_place:
            self._failures = self._group.stop_failed() or self._failures

    def _report_broken(self, generation: Generation, failure: Failure) -> None:
        if self._reported_broken >= generation.number:
            return
        self._reported_broken = generation.number
        self._agent.emit(
            events.IncidentOpened(
                id=generation.number, reason=str(failure), node=failure.node, rank=failure.rank
            )
        )
        alive_s = time.monotonic() - self._group.started_at
        self._store.tell(lambda: self._session.report_broken(generation.number, failure, alive_s=alive_s))

    def _fail_for_good(self, failure: Failure) -> None:
        self._store.tell(lambda: self._session.close_run("failed", str(failure), failure))
        self._group.stop(str(failure))
        self._result = RunResult(WorkerState.FAILED, failures=self._failures)

    # Deadlines and signals.

    def _on_deadlines(self) -> None:
        now = time.monotonic()
        self._group.kill_stuck(now)
        if self._store.retry_at is not None and now >= self._store.retry_at and self._result is None:
            self._store.tell_again()
            self._enter_newest()
        rejoin_at = self._fence.rejoin.due
        if rejoin_at is not None and now >= rejoin_at and self._result is None:
            self._fence.try_to_rejoin()
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
        may_stay = self._group.running and self._group.can_stay
        graceful = may_stay and received in STOP_SIGNALS and self._stop_deadline is None
        if not graceful:
            raise SignalException(f"got signal {received.name}", received)
        self._ask_to_leave(received)

    def _ask_to_leave(self, received: signal.Signals) -> None:
        """The workers agree on a boundary, commit a snapshot there, and end."""
        self._stop_signal = received
        self._stop_deadline = time.monotonic() + self._agent.stop_timeout_s
        self._group.ask_to_leave(received, self._agent.stop_timeout_s)
