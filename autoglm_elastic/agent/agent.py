"""The elastic agent: torch's `LocalElasticAgent`, driven by events instead of a polling interval.

What it adds: workers come from the zygote, their death is seen through pidfds, and with our own rendezvous
the survivors of a failure keep their processes (`supervisor.py`). With any other rendezvous it behaves as
torch's agent does, restarting the group, only sooner. Everything else (worker environment, log directories,
error files, events, the exit barrier) is inherited, so that a newer torch brings its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch.distributed.elastic.agent.server.local_elastic_agent as torch_agent
from torch.distributed.elastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs, PContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from autoglm_elastic import wire
from autoglm_elastic.agent._notes import Recent
from autoglm_elastic.agent.context import WorkerChannel, ZygoteContext
from autoglm_elastic.agent.process import ForkedProcess
from autoglm_elastic.agent.rendezvous import AutoglmRendezvousHandler
from autoglm_elastic.agent.slots import WorkerSlot
from autoglm_elastic.agent.supervisor import Supervisor
from autoglm_elastic.agent.zygote import Zygote
from autoglm_elastic.core.budget import Budget
from autoglm_elastic.core.membership import Generation, Placement
from autoglm_elastic.errors import ExitCode
from autoglm_elastic.observe.events import Event, EventLog, make
from autoglm_elastic.observe.view import trouble
from autoglm_elastic.settings import Settings

logger = logging.getLogger(__name__)


class ElasticAgent(LocalElasticAgent):  # type: ignore[misc]  # torch's class is untyped
    """One node's agent.

    Args:
        spec, logs_specs, start_method, log_line_prefix_template, shutdown_timeout: as torch's.
        zygote: where workers are forked from; None starts them as torch does.
        settings: the job's settings.
        run_dir: the run directory, or None.
        events: the event log.

    After `run()`: `requeue` tells that the workers left on an agreed stop with a durable snapshot.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: LogsSpecs,
        start_method: str = "spawn",
        log_line_prefix_template: str | None = None,
        shutdown_timeout: int = 30,
        *,
        zygote: Zygote | None,
        settings: Settings,
        run_dir: Path | None,
        events: EventLog,
    ) -> None:
        super().__init__(
            spec,
            logs_specs,
            start_method=start_method,
            log_line_prefix_template=log_line_prefix_template,
            shutdown_timeout=shutdown_timeout,
        )
        self.requeue = False
        self.slots = [WorkerSlot(local_rank) for local_rank in range(spec.local_world_size)]
        self.settings = settings
        self.recent = Recent()
        self._events = events
        self._zygote = zygote
        self._run_dir = run_dir

    def emit(self, event: Event) -> None:
        """Note an event in the run's log."""
        self._events.emit(event)
        self.recent.take(event)

    def emit_named(self, name: str, fields: Mapping[str, object], *, rank: int) -> None:
        """Note an event that a worker sent, and say it where people look if something is wrong."""
        self._events.emit_named(name, fields, source=f"rank {rank}")
        with contextlib.suppress(TypeError, ValueError):
            if text := trouble(make(name, fields)):
                logger.warning("%s", text)

    @property
    def spec(self) -> WorkerSpec:
        return self._worker_group.spec

    @property
    def stop_timeout_s(self) -> float:
        return float(self._shutdown_timeout)

    @property
    def finish_timeout_s(self) -> float:
        """How long a node whose workers are done waits for the others (torch's exit barrier)."""
        return float(self._exit_barrier_timeout)

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        handler = self.spec.rdzv_handler
        if isinstance(handler, AutoglmRendezvousHandler):
            return Supervisor(self, handler).run()
        return self._run_with_foreign_rendezvous()

    def _run_with_foreign_rendezvous(self) -> RunResult:
        """torch's own loop with two differences: a death wakes it at once, and progress forgives old
        failures.

        A foreign handler can only be asked, so `num_nodes_waiting` is asked once per monitor interval, as
        torch does.
        """
        budget = Budget(self.spec.max_restarts, self.settings.restart.progress_s)
        restarts = 0
        self._initialize_workers(self._worker_group)
        started = time.monotonic()
        while True:
            self._wait_for_death(self.spec.monitor_interval)
            result: RunResult = self._monitor_workers(self._worker_group)
            self._worker_group.state = result.state
            if result.state == WorkerState.SUCCEEDED:
                self._exit_barrier()  # type: ignore[no-untyped-call]
                return result
            if result.state in {WorkerState.UNHEALTHY, WorkerState.FAILED}:
                exit_codes = {failure.exitcode for failure in result.failures.values()}
                budget, allowed = budget.charge(-1, time.monotonic() - started)
                if not allowed or self.spec.max_restarts == 0 or ExitCode.DO_NOT_RESTART in exit_codes:
                    self._stop_workers(self._worker_group)
                    self._worker_group.state = WorkerState.FAILED
                    return result
                restarts += 1
                self._remaining_restarts = self.spec.max_restarts - restarts
                self._restart_workers(self._worker_group)
                started = time.monotonic()
            elif self.spec.rdzv_handler.num_nodes_waiting() > 0:
                self._restart_workers(self._worker_group)
                started = time.monotonic()

    def _wait_for_death(self, timeout_s: float) -> None:
        context = self._pcontext
        if not isinstance(context, ZygoteContext):
            time.sleep(timeout_s)
            return
        poller = select.poll()
        for pidfd in context.pidfds().values():
            poller.register(pidfd, select.POLLIN)
        poller.poll(timeout_s * 1000)

    # What the supervisor does to the workers of this node.

    def place(self, generation: Generation, placement: Placement, store: Any, addr: str, port: int) -> None:
        """Note the ranks that `generation` gives to this node's workers, as torch's rendezvous would."""
        group: Any = self._worker_group
        group.workers = [
            Worker(
                local_rank=local_rank,
                global_rank=placement.base_rank + local_rank,
                role_rank=placement.role_base_rank + local_rank,
                world_size=generation.world_size,
                role_world_size=generation.role_world_size(placement.role),
            )
            for local_rank in range(self.spec.local_world_size)
        ]
        group.store = self._store = store
        group.group_rank = placement.group_rank
        group.group_world_size = len(generation.placements)
        group.master_addr, group.master_port = addr, port
        self._remaining_restarts = self.spec.max_restarts - generation.restart_count

    def start_all(self) -> None:
        """Start a process in every slot."""
        ids = self._start_workers(self._worker_group)
        for local_rank, pid in ids.items():
            self._worker_group.workers[local_rank].id = pid
            self.slots[local_rank].pid = pid
        self._worker_group.state = WorkerState.HEALTHY

    def stop_all(self) -> None:
        """Stop every process of this node, as torch does: signal, grace, SIGKILL."""
        self._stop_workers(self._worker_group)
        self._worker_group.state = WorkerState.STOPPED
        for slot in self.slots:
            slot.note()
            slot.close()
            slot.pid = 0

    def replace(self, slot: WorkerSlot) -> None:
        """A new process in one slot; the others are not touched."""
        context = self._context()
        worker = self._worker_group.workers[slot.local_rank]
        ends = slot.open()
        try:
            context.replace(
                slot.local_rank,
                self._placement_environment(worker),
                WorkerChannel({wire.ENV_CONTROL_FD: ends.control.fileno(), wire.ENV_BOARD_FD: ends.board_fd}),
            )
        finally:
            ends.control.close()
        slot.pid = worker.id = context.pids()[slot.local_rank]

    def how_started(self, slot: WorkerSlot) -> Literal["fork", "spawn"]:
        """From the zygote, or as a fresh interpreter."""
        process = self._context().subprocess_handlers[slot.local_rank].proc
        return "fork" if isinstance(process, ForkedProcess) and process.fresh_because is None else "spawn"

    def kill(self, slot: WorkerSlot) -> None:
        """SIGKILL the process of one slot and its session."""
        self._context().kill(slot.local_rank)

    def pidfds(self) -> dict[int, int]:
        """Readable when the process of that local rank is dead."""
        return {} if self._pcontext is None else self._context().pidfds()

    def exits(self) -> dict[int, int]:
        """Exit codes (negative: a signal) of the processes that have ended, by local rank."""
        return {} if self._pcontext is None else self._context().poll_exits()

    def group_result(self) -> RunResult:
        """torch's judgement of the whole group; stops the others when one has failed."""
        result: RunResult = self._monitor_workers(self._worker_group)
        return result

    def failure_of(self, slot: WorkerSlot) -> ProcessFailure:
        """torch's record of a worker's death, with what its error file says."""
        context = self._context()
        return ProcessFailure(
            local_rank=slot.local_rank,
            pid=slot.pid,
            exitcode=-signal.SIGKILL if slot.exit_code is None else slot.exit_code,
            error_file=context.error_files[slot.local_rank],
        )

    def _context(self) -> ZygoteContext:
        if not isinstance(self._pcontext, ZygoteContext):
            raise RuntimeError("no worker of this node was started by the zygote's context")
        return self._pcontext

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with _processes_started_by(self._start_processes):
            return super()._start_workers(worker_group)  # type: ignore[no-any-return]

    def _start_processes(
        self, *, start_method: str, entrypoint: Any, envs: dict[int, dict[str, str]], **rest: Any
    ) -> PContext:
        """In place of torch's `start_processes`: the same arguments, workers from the zygote."""
        if not isinstance(entrypoint, str):
            started: PContext = _torch_start_processes(
                start_method=start_method, entrypoint=entrypoint, envs=envs, **rest
            )
            return started
        ends = {}
        for local_rank, environment in envs.items():
            environment.update(self._own_environment())
            ends[local_rank] = self.slots[local_rank].open()
        channels = {
            local_rank: WorkerChannel(
                {wire.ENV_CONTROL_FD: end.control.fileno(), wire.ENV_BOARD_FD: end.board_fd}
            )
            for local_rank, end in ends.items()
        }
        context = ZygoteContext(
            entrypoint=entrypoint, envs=envs, zygote=self._zygote, channels=channels, **rest
        )
        try:
            context.start()
        except BaseException:
            context.close()
            raise
        finally:
            for end in ends.values():
                end.control.close()
        return context

    def _own_environment(self) -> dict[str, str]:
        environment = {
            wire.ENV_RUN_ID: self.spec.rdzv_handler.get_run_id(),
            wire.ENV_SETTINGS: self.settings.to_json(),
        }
        if self._run_dir is not None:
            environment[wire.ENV_RUN_DIR] = os.fspath(self._run_dir)
        return environment

    def _placement_environment(self, worker: Worker) -> dict[str, str]:
        group: Any = self._worker_group
        return {
            "RANK": str(worker.global_rank),
            "WORLD_SIZE": str(worker.world_size),
            "ROLE_RANK": str(worker.role_rank),
            "ROLE_WORLD_SIZE": str(worker.role_world_size),
            "GROUP_RANK": str(group.group_rank),
            "GROUP_WORLD_SIZE": str(group.group_world_size),
            "MASTER_ADDR": group.master_addr,
            "MASTER_PORT": str(group.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(self.spec.max_restarts - self._remaining_restarts),
        }


_torch_module: Any = torch_agent
_torch_start_processes: Callable[..., PContext] = _torch_module.start_processes


@contextlib.contextmanager
def _processes_started_by(start: Callable[..., PContext]) -> Iterator[None]:
    """While inside, torch's agent calls `start` where it would call its own `start_processes`.

    torch offers no seam there; this keeps its way of building the worker environment instead of a copy of it.
    """
    _torch_module.start_processes = start
    try:
        yield
    finally:
        _torch_module.start_processes = _torch_start_processes
