"""What the agent holds of a worker process: something that looks like `subprocess.Popen` and can be watched.

`ForkedProcess` is a child of the zygote, `SpawnedProcess` a child of the agent itself. Both have a `pidfd`
that becomes readable the moment the process is dead, so nobody has to ask at intervals. This module starts
nothing from a zygote (`zygote.py` does) and knows nothing of ranks (`context.py` does).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

STATUS_WAIT_S: Final = 5.0
"""How long a dead worker's exit status may take from the zygote. Past it the zygote is as good as dead."""

STATUS_UNKNOWN: Final = -int(signal.SIGKILL)
"""Exit status of a worker whose zygote died before it could tell: the kernel killed the worker with it."""

STATUS: Final = struct.Struct("<i")
"""How the zygote writes an exit status into the pipe: as `Popen.returncode`, negative for a signal."""


class WorkerProcess(Protocol):
    """What torch's SubprocessHandler and our agent need of a process; `subprocess.Popen` with a `pidfd`."""

    pid: int
    returncode: int | None
    pidfd: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SpawnRequest:
    """A process to start.

    Args:
        command: the whole command line, `command[0]` being the program.
        env: the complete environment.
        cwd: working directory; None for the agent's.
        stdin, stdout, stderr: file descriptors of the agent that become 0, 1 and 2.
        pass_fds: environment variable → file descriptor of the agent. The process has a copy of it; the
            variable holds its number there.
        fork: False starts a fresh process even where forking would do.
    """

    command: Sequence[str]
    env: Mapping[str, str]
    cwd: str | None = None
    stdin: int = 0
    stdout: int = 1
    stderr: int = 2
    pass_fds: Mapping[str, int] = field(default_factory=dict)
    fork: bool = True

    def python_script(self) -> PythonScript | None:
        """The script in `<this python> -u [-m] script args`, None for any other command."""
        command = list(self.command)
        if len(command) < 2 or command[0] != sys.executable:
            return None
        arguments = command[1:]
        while arguments and arguments[0] == "-u":
            del arguments[0]
        module = bool(arguments) and arguments[0] == "-m"
        if module:
            del arguments[0]
        if not arguments or (arguments[0].startswith("-") and not module):
            return None
        return PythonScript(arguments[0], tuple(arguments[1:]), module)


@dataclass(frozen=True, slots=True)
class PythonScript:
    """`path` is a module's name when `module` is set."""

    path: str
    args: tuple[str, ...]
    module: bool


class ForkedProcess:
    """A child of the zygote. It stays a zombie until its exit status has been read here, as with `Popen`, so
    its pid and process group cannot belong to another process while `poll()` gives None.

    Args:
        pidfd: owned by this object.
        status_fd: the read end of a pipe into which the zygote writes the exit status; owned by this object.
        fresh_because: why it was not forked but executed anew; None when it was forked.
    """

    def __init__(
        self, args: Sequence[str], pid: int, pidfd: int, status_fd: int, fresh_because: str | None = None
    ) -> None:
        self.args = list(args)
        self.pid = pid
        self.pidfd = pidfd
        self.returncode: int | None = None
        self.fresh_because = fresh_because
        self._status_fd = status_fd

    def poll(self) -> int | None:
        """The exit status, or None while the process lives."""
        if self.returncode is None and _readable(self.pidfd, 0.0):
            self.returncode = self._read_status()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises `subprocess.TimeoutExpired` after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            _readable(self.pidfd, remaining)
        if self.returncode is None:
            raise RuntimeError("a process that has ended has an exit status")
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """Does nothing when the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Forget the process, dead or not; idempotent. Its pidfd is no longer valid."""
        self._acknowledge()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def _read_status(self) -> int:
        try:
            data = os.read(self._status_fd, STATUS.size) if _readable(self._status_fd, STATUS_WAIT_S) else b""
        finally:
            self._acknowledge()
        return int(STATUS.unpack(data)[0]) if len(data) == STATUS.size else STATUS_UNKNOWN

    def _acknowledge(self) -> None:
        """Closing the pipe tells the zygote that it may reap the process."""
        if self._status_fd >= 0:
            os.close(self._status_fd)
            self._status_fd = -1

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ForkedProcess pid={self.pid} returncode={self.returncode}>"


class SpawnedProcess(subprocess.Popen[bytes]):
    """A child of the agent, started as torch starts workers, with a pidfd and the request's descriptors."""

    def __init__(self, request: SpawnRequest) -> None:
        self.pidfd = -1
        env, inherited = dict(request.env), []
        try:
            for name, fd in request.pass_fds.items():
                inherited.append(os.dup(fd))
                env[name] = str(inherited[-1])
            super().__init__(
                list(request.command),
                env=env,
                cwd=request.cwd,
                stdin=request.stdin,
                stdout=request.stdout,
                stderr=request.stderr,
                pass_fds=inherited,
                start_new_session=True,
            )
        finally:
            for fd in inherited:
                os.close(fd)
        self.pidfd = os.pidfd_open(self.pid)

    def __del__(self, *args: Any) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        super().__del__(*args)


def _readable(fd: int, timeout_s: float | None) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(None if timeout_s is None else timeout_s * 1000))
