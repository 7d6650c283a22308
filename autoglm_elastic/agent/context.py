"""torch's `SubprocessContext` with workers from the zygote, any of which can be replaced while the others run.

Redirects, tee, log tailing, filters, error files, the all-or-nothing `wait` and `close` are torch's own. Only
how a process is started differs, and what has no equivalent there: `replace`, `kill`, `pidfds`, `poll_exits`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from torch.distributed.elastic.multiprocessing import LogsSpecs, SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.numa.binding import NumaOptions

from autoglm_elastic.agent.process import SpawnedProcess, SpawnRequest, WorkerProcess
from autoglm_elastic.agent.zygote import Zygote, ZygoteGone
from autoglm_elastic.errors import PlatformError

logger = logging.getLogger(__name__)

KILL_WAIT_S: Final = 30.0
"""How long a killed worker may take to end; one that sits in the kernel (a dead device) may never do."""


@dataclass(frozen=True, slots=True)
class WorkerChannel:
    """What a worker inherits besides its streams: environment variable → descriptor of the agent.

    The worker gets a copy; the agent may close its own once the worker has been started.
    """

    pass_fds: Mapping[str, int]


class WorkerHandler(SubprocessHandler):
    """torch's handler of one worker; its `proc` comes from `zygote`, or is a child of ours when that is None.

    Args:
        append: keep what a predecessor wrote into the log files.
    """

    proc: WorkerProcess  # type: ignore[assignment]  # looks like a Popen, is none

    def __init__(
        self,
        *,
        zygote: Zygote | None,
        channel: WorkerChannel | None,
        append: bool,
        stdout: str,
        stderr: str,
        **rest: Any,
    ) -> None:
        self._zygote = zygote
        self._pass_fds = {} if channel is None else dict(channel.pass_fds)
        self._append = append
        self._paths = stdout, stderr
        super().__init__(stdout="", stderr="", **rest)

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> WorkerProcess:  # type: ignore[override]
        mode = "a" if self._append else "w"
        with contextlib.ExitStack() as closing:
            fds = [
                closing.enter_context(open(path, mode)).fileno() if path else inherited
                for path, inherited in zip(self._paths, (1, 2), strict=True)
            ]
            request = SpawnRequest(args, env, stdout=fds[0], stderr=fds[1], pass_fds=self._pass_fds)
            if self._zygote is None:
                return SpawnedProcess(request)
            return _spawn(self._zygote, request)


class ZygoteContext(SubprocessContext):
    """The worker processes of one node.

    Args:
        zygote: None starts workers as torch does.
        channels: what each local rank inherits; missing ranks inherit nothing.

    The other arguments are those of torch's `SubprocessContext`.
    """

    def __init__(
        self,
        name: str,
        entrypoint: str,
        args: dict[int, tuple[Any, ...]],
        envs: dict[int, dict[str, str]],
        logs_specs: LogsSpecs,
        log_line_prefixes: dict[int, str] | None = None,
        numa_options: NumaOptions | None = None,
        duplicate_stdout_filters: list[str] | None = None,
        duplicate_stderr_filters: list[str] | None = None,
        *,
        zygote: Zygote | None,
        channels: Mapping[int, WorkerChannel] | None = None,
    ) -> None:
        super().__init__(
            name,
            entrypoint,
            args,
            envs,
            logs_specs,
            log_line_prefixes,
            numa_options,
            duplicate_stdout_filters,
            duplicate_stderr_filters,
        )
        self._zygote = zygote
        self._channels = dict(channels or {})

    def replace(
        self, local_rank: int, env_updates: Mapping[str, str], channel: WorkerChannel | None = None
    ) -> None:
        """Start a new process for `local_rank`; what is left of the old one is killed first.

        Log files are appended to, the error file of the old process is removed. `env_updates` stay for later
        ones. Raises what `kill` and `Zygote.spawn` raise.
        """
        self.kill(local_rank)
        self.envs[local_rank].update(env_updates)
        error_file = self.error_files[local_rank]
        if error_file != os.devnull:
            with contextlib.suppress(FileNotFoundError):
                os.remove(error_file)
        self._failures.pop(local_rank, None)
        self.subprocess_handlers[local_rank] = self._handler(local_rank, channel, append=True)
        self._running_local_ranks.add(local_rank)

    def kill(self, local_rank: int) -> None:
        """SIGKILL the session of that worker, its own children included, and wait for its end.

        Raises `PlatformError` when it does not come.
        """
        process = self._processes()[local_rank]
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            try:
                process.wait(KILL_WAIT_S)
            except subprocess.TimeoutExpired as error:
                raise PlatformError(
                    f"worker {local_rank} (pid {process.pid}) has not ended {KILL_WAIT_S:.0f} s after SIGKILL",
                    do="look at its device: a process that waits in the kernel cannot be killed",
                ) from error

    def pidfds(self) -> dict[int, int]:
        """By local rank: readable when that process is dead. Valid until it is replaced."""
        return {rank: process.pidfd for rank, process in self._processes().items()}

    def poll_exits(self) -> dict[int, int]:
        """Exit status (negative: a signal) of every process that has ended, by local rank."""
        statuses = {rank: process.poll() for rank, process in self._processes().items()}
        return {rank: status for rank, status in statuses.items() if status is not None}

    def _processes(self) -> dict[int, WorkerProcess]:
        return {rank: cast(WorkerHandler, handler).proc for rank, handler in self.subprocess_handlers.items()}

    def _start(self) -> None:
        if self.subprocess_handlers:
            raise ValueError("the workers of this context have been started already")
        for local_rank in range(self.nprocs):
            # One by one into the dictionary: when one cannot be started, `close` ends those before it.
            channel = self._channels.get(local_rank)
            self.subprocess_handlers[local_rank] = self._handler(local_rank, channel, append=False)

    def _handler(self, local_rank: int, channel: WorkerChannel | None, *, append: bool) -> WorkerHandler:
        return WorkerHandler(
            zygote=self._zygote,
            channel=channel,
            append=append,
            entrypoint=self.entrypoint,
            args=self.args[local_rank],
            env=self.envs[local_rank],
            stdout=self.stdouts[local_rank],
            stderr=self.stderrs[local_rank],
            local_rank_id=local_rank,
            numa_options=self._numa_options,
        )


def _spawn(zygote: Zygote, request: SpawnRequest) -> WorkerProcess:
    try:
        return zygote.spawn(request)
    except ZygoteGone as error:
        logger.warning("%s; a new one is started", error)
        zygote.respawn()
        return zygote.spawn(request)
