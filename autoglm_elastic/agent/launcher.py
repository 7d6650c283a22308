"""From a checked command line to a finished job: torch's `run()` and `launch_agent()`, around our agent.

May touch: this process's environment, the run directory, the zygote, the agent. Must never: print, start
anything before the command line is checked, or start a thread before the zygote is forked.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic import events as torch_events
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.metrics import initialize_metrics
from torch.distributed.elastic.metrics.api import MetricsConfig
from torch.distributed.elastic.multiprocessing import LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config
from torch.distributed.launcher import api as torch_launcher
from torch.distributed.launcher.api import LaunchConfig

from autoglm_elastic.agent import _endpoint, _foreign, _security, flags, run_path
from autoglm_elastic.agent._reverse_dns import forgo_reverse_lookups
from autoglm_elastic.agent.agent import ElasticAgent
from autoglm_elastic.agent.keeper import NodeKeeper, name_of_node
from autoglm_elastic.agent.rendezvous import AutoglmRendezvousHandler, torchrun_handler
from autoglm_elastic.agent.run_dir import RunDirectory
from autoglm_elastic.agent.snapshot_place import SnapshotPlace
from autoglm_elastic.agent.zygote import Zygote
from autoglm_elastic.errors import ExitCode, PlatformError, UsageError
from autoglm_elastic.observe import events, presence
from autoglm_elastic.ports import StoreUnavailable
from autoglm_elastic.settings import Settings, Tls
from autoglm_elastic.storage import modules_of

logger = logging.getLogger(__name__)

SHARED_STORE_OFF: Final = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""torch's switch for a fresh store per attempt. With its shared one a restarted rank can read the address
that a peer had in the attempt before, and hang."""


def launch(command: flags.Command) -> int:
    """Run the job of `command`; the exit code when its workers are done (0 or 75).

    Raises:
        ElasticError: one line for the person, with its exit code.
        ChildFailedError: a worker failed for good; its text is torch's failure summary.
        SignalException: this launcher was told to stop, and has stopped its workers.
    """
    _check_security(command)
    run_dir = None
    if command.args.run_dir is not None:
        run_dir = RunDirectory(command.args.run_dir, run_id=command.run_id_given)
    place = _snapshot_place(command)
    forgo_reverse_lookups()
    zygote = _fork_zygote(command)
    try:
        # torch's @record: this launcher's own error file, for a launcher above it. After the fork, because it
        # enables faulthandler, which a fresh interpreter of a worker would not have.
        return record(_launch)(command, run_dir, place, zygote) or ExitCode.DONE
    finally:
        if zygote is not None:
            zygote.close()
        if run_dir is not None:
            run_dir.unlock()


def _check_security(command: flags.Command) -> None:
    if not command.is_ours:
        if command.loaded.settings.tls != Tls():
            logger.warning("tls: --rdzv-backend=%s is torch's own, and plain", command.args.rdzv_backend)
    else:
        try:
            given = _parse_rendezvous_config(command.args.rdzv_conf)
        except ValueError as error:
            raise UsageError(f"--rdzv-conf {command.args.rdzv_conf}: {_one_line(error)}") from error
        options = {**_security.options_of(command.loaded.settings), **given}
        _endpoint.check(command.args.rdzv_endpoint, options)


def exit_code_of(error: ChildFailedError) -> ExitCode:
    """The launcher's exit code when a worker failed for good."""
    codes = {failure.exitcode for failure in error.failures.values()}
    return ExitCode.DO_NOT_RESTART if ExitCode.DO_NOT_RESTART in codes else ExitCode.FAILED


def _fork_zygote(command: flags.Command) -> Zygote | None:
    args, settings = command.args, command.loaded.settings
    another_program = args.no_python or os.environ.get("PYTHON_EXEC", sys.executable) != sys.executable
    if not settings.zygote.enabled or another_program:
        return None
    folder = "." if args.module else os.path.dirname(args.training_script)
    preload = (*settings.zygote.preload, *modules_of(settings.snapshot.url))
    return Zygote.fork(preload=preload, search_path=folder or ".")


def _snapshot_place(command: flags.Command) -> SnapshotPlace | None:
    url = command.loaded.settings.snapshot.url
    if not url:
        return None
    if command.args.run_dir is None:
        raise UsageError(
            f"snapshot.url {url} without a run directory", do="give --run-dir for events and logs"
        )
    if command.args.fresh:
        raise UsageError(
            f"--fresh does not remove the snapshots in {url}", do="give another snapshot.url instead"
        )
    return SnapshotPlace(url)


def _launch(
    command: flags.Command, run_dir: RunDirectory | None, place: SnapshotPlace | None, zygote: Zygote | None
) -> int:
    torch.multiprocessing._set_thread_name("pt_elastic")
    if run_dir is not None:
        _begin(command, run_dir, place)
    config, entrypoint, arguments = _config(command, run_dir, place)
    name = torch_launcher._get_entrypoint_name(entrypoint, arguments)
    if not isinstance(entrypoint, str):  # --run-path; torch's only entrypoint that is no command
        entrypoint, arguments = sys.executable, ["-u", "-m", run_path.__name__, *arguments]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle
    if config.rdzv_backend == "c10d":
        os.environ.setdefault(SHARED_STORE_OFF, "1")
    # A job that nobody else joins has the MASTER_ADDR that torchrun gives it.
    parameters, handler = _rendezvous(config, "localhost" if command.is_alone else None)
    shut_down = True
    try:
        if run_dir is not None:
            _settle_lock(command, run_dir, handler)
        spec = _spec(config, entrypoint, arguments, parameters, handler)
        node = _node_of(handler)
        here = contextlib.nullcontext() if run_dir is None else presence.declared(run_dir.path, node)
        with here, contextlib.closing(_event_log(run_dir, node)) as log, _keeper(command, run_dir, log):
            agent = ElasticAgent(
                spec,
                cast(LogsSpecs, config.logs_specs),  # LaunchConfig has filled in both
                start_method=config.start_method,
                log_line_prefix_template=config.log_line_prefix_template,
                shutdown_timeout=cast(int, config.shutdown_timeout),
                zygote=zygote,
                settings=command.loaded.settings,
                run_dir=None if run_dir is None else run_dir.path,
                events=log,
            )
            log.emit(_job_started(command, config, handler))
            with _telling_how_it_ended(agent, log, handler):
                return _run(agent, config, name)
    except SignalException:
        shut_down = False  # as torch: the rendezvous stays open for the other nodes
        raise
    finally:
        if shut_down:
            handler.shutdown()


def _keeper(
    command: flags.Command, run_dir: RunDirectory | None, log: events.EventLog
) -> contextlib.AbstractContextManager[object]:
    """A keeper for as long as the job lasts, where there is something to keep."""
    if run_dir is None:
        return contextlib.nullcontext()
    settings = command.loaded.settings
    given = _parse_rendezvous_config(command.args.rdzv_conf).get("node")
    url = settings.snapshot.url or os.fspath(run_dir.path)
    return NodeKeeper(url, name_of_node(given), settings, log)


def _begin(command: flags.Command, run_dir: RunDirectory, place: SnapshotPlace | None) -> None:
    """Claim and create the run directory. With an endpoint that others know, who claims it is seen later."""
    args = command.args
    if command.is_alone or args.fresh:
        run_dir.lock()
    if args.fresh:
        run_dir.destroy(args.destroy)
    words = ["autoglm-run", *command.argv]
    if place is not None:
        place.claim(run_dir, words)
    run_dir.begin(words)


def _settle_lock(command: flags.Command, run_dir: RunDirectory, handler: RendezvousHandler) -> None:
    """The lock is the store host's: taken when this agent turns out to be it, given back when it is not."""
    if isinstance(handler, AutoglmRendezvousHandler):
        hosts = handler.hosts_store
    else:
        hosts = flags.nodes(command.args)[1] == 1 or (
            command.args.rdzv_backend == "static" and command.args.node_rank == 0
        )
    if hosts:
        run_dir.lock()
    else:
        run_dir.unlock()


def _config(
    command: flags.Command, run_dir: RunDirectory | None, place: SnapshotPlace | None
) -> tuple[LaunchConfig, Any, list[str]]:
    args = command.args
    if run_dir is not None and args.log_dir is None:
        args.log_dir = os.fspath(run_dir.path / "logs")
    if command.run_id_given is None and command.is_alone:
        args.rdzv_id = run_dir.run_id if run_dir is not None else str(uuid.uuid4())
    try:
        config, entrypoint, arguments = torchrun.config_from_args(args)
    except (ValueError, AssertionError, RuntimeError, OSError) as error:
        raise UsageError(_one_line(error), do="autoglm-run --help lists the flags") from error
    if config.nproc_per_node < 1:
        raise UsageError(
            f"--nproc-per-node {args.nproc_per_node}", valid="a number from 1 on, or cpu, gpu, auto"
        )
    if command.is_ours:
        first_generation = run_dir.next_generation() if run_dir is not None else 1
        if place is not None:
            first_generation = max(first_generation, place.next_generation())
        config.rdzv_configs |= _our_rdzv_configs(args, config, command.loaded.settings, first_generation)
    return config, entrypoint, arguments


def _our_rdzv_configs(
    args: argparse.Namespace, config: LaunchConfig, settings: Settings, first_generation: int
) -> dict[str, Any]:
    """What our rendezvous is told; a user's own --rdzv-conf wins over the settings."""
    membership = settings.membership
    ours = {
        "join_window_s": membership.join_window_s,
        "lease_s": membership.lease_s,
        "join_timeout": membership.join_timeout_s,
        "first_generation": first_generation,
        "max_restarts": config.max_restarts,
        "progress_s": settings.restart.progress_s,
        "max_failures": settings.restart.max_failures,
        "nproc": config.nproc_per_node,
        "role": config.role,
        **_security.options_of(settings),
    }
    given = _parse_rendezvous_config(args.rdzv_conf)
    if "timeout" in given:
        given.setdefault("join_timeout", given["timeout"])
    return {**ours, **given}


def _rendezvous(config: LaunchConfig, address: str | None) -> tuple[RendezvousParameters, RendezvousHandler]:
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr or address,
        **config.rdzv_configs,
    )
    try:
        if config.rdzv_backend == flags.BACKEND:
            return parameters, torchrun_handler()(parameters)
        return parameters, _foreign.handler_of(parameters)
    except (RendezvousError, dist.DistError, StoreUnavailable, OSError) as error:
        raise PlatformError(
            f"rendezvous {config.rdzv_backend} at {config.rdzv_endpoint}: {_one_line(error)}"
        ) from error
    except (ValueError, ModuleNotFoundError) as error:
        raise UsageError(f"--rdzv-backend {config.rdzv_backend}: {_one_line(error)}") from error


def _spec(
    config: LaunchConfig,
    entrypoint: Any,
    arguments: list[str],
    parameters: RendezvousParameters,
    handler: RendezvousHandler,
) -> WorkerSpec:
    """As torch's `launch_agent`."""
    master_addr, master_port = torch_launcher._get_addr_and_port(parameters)
    return WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=entrypoint,
        args=tuple(arguments),
        rdzv_handler=handler,
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        master_addr=master_addr,
        master_port=master_port,
        local_addr=config.local_addr,
        event_log_handler=config.event_log_handler,
        numa_options=config.numa_options,
        duplicate_stdout_filters=config.duplicate_stdout_filters,
        duplicate_stderr_filters=config.duplicate_stderr_filters,
        virtual_local_rank=config.virtual_local_rank,
    )


def _run(agent: ElasticAgent, config: LaunchConfig, name: str) -> int:
    """Run the agent with torch's events and metrics around it, as its `launch_agent` does."""
    initialize_metrics(MetricsConfig(config.metrics_cfg))
    try:
        result: RunResult | None = agent.run()
        torch_events.record(agent.get_event_succeeded(), config.event_log_handler)
    except Exception as error:
        torch_events.record(agent.get_event_failed(), config.event_log_handler)
        if isinstance(error, RendezvousError | dist.DistError | StoreUnavailable):
            raise PlatformError(
                f"rendezvous {config.rdzv_backend} at {config.rdzv_endpoint}: {_one_line(error)}"
            ) from error
        raise
    if result is not None and result.is_failed():
        raise ChildFailedError(name=name, failures=result.failures)
    return ExitCode.REQUEUE if agent.requeue else ExitCode.DONE


def _node_of(handler: RendezvousHandler) -> str:
    if isinstance(handler, AutoglmRendezvousHandler):
        return handler.session.node
    return f"{socket.gethostname()}-{os.getpid()}"


def _event_log(run_dir: RunDirectory | None, node: str) -> events.EventLog:
    path = os.devnull if run_dir is None else run_dir.path / events.EVENTS_NAME
    return events.EventLog(path, source=node)


def _job_started(
    command: flags.Command, config: LaunchConfig, handler: RendezvousHandler
) -> events.JobStarted:
    ours = handler if isinstance(handler, AutoglmRendezvousHandler) else None
    return events.JobStarted(
        run_id=config.run_id,
        node=_node_of(handler),
        command=["autoglm-run", *command.argv],
        nproc=config.nproc_per_node,
        pid=os.getpid(),
        store=config.rdzv_endpoint if ours is None else ours.endpoint,
        hosts_store=ours is not None and ours.hosts_store,
    )


@contextlib.contextmanager
def _telling_how_it_ended(
    agent: ElasticAgent, log: events.EventLog, handler: RendezvousHandler
) -> Iterator[None]:
    """Logs the end of the job, once a job: by the agent that speaks for it."""
    ours = handler if isinstance(handler, AutoglmRendezvousHandler) else None

    def tell(event: events.Event) -> None:
        if ours is None or ours.speaks_for_job:
            log.emit(event)

    def where() -> dict[str, int]:
        current = None if ours is None else ours.current
        return {
            "step": max((slot.step_max for slot in agent.slots), default=-1),
            "generation": 0 if current is None else current.number,
        }

    try:
        yield
    except SignalException as error:
        tell(events.JobStopped(signal=int(error.sigval), step=where()["step"]))
        raise
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        reason = f"rank {rank}: exit code {failure.exitcode}: {_first_message(failure)}"
        exit_code = int(exit_code_of(error))
        tell(events.JobFailed(reason=reason, generation=where()["generation"], exit_code=exit_code))
        raise
    except Exception as error:
        tell(events.JobFailed(reason=_one_line(error), generation=where()["generation"]))
        raise
    if agent.requeue:
        tell(events.JobStopped(signal=0, step=where()["step"], requeue=True))
    else:
        tell(events.JobFinished(**where()))


def _first_message(failure: ProcessFailure) -> str:
    message = failure.message
    return _first_line(str(message.get("message", "")) if isinstance(message, dict) else str(message))


def _one_line(error: BaseException) -> str:
    return _first_line(str(error)) or type(error).__name__


def _first_line(text: str) -> str:
    """The first line that says something; some of torch's messages begin with an empty one."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
