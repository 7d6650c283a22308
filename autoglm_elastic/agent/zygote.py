"""The agent's side of the zygote: start it, ask it for workers, notice its death, replace it.

The first zygote is a fork of the launcher and shares its memory: torch is imported once on a node. A later
one is executed, because by then the agent has threads, and a fork of a process with threads may hang. Thread
safe.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any, Final

from autoglm_elastic.agent import _linux, _zygote_server, _zygote_wire
from autoglm_elastic.agent.process import ForkedProcess, SpawnRequest
from autoglm_elastic.errors import PlatformError, UsageError

logger = logging.getLogger(__name__)

READY_WAIT_S: Final = 600.0
"""Importing torch and the preloaded modules; minutes on a cold network file system."""

SPAWN_WAIT_S: Final = 60.0
"""A fork takes milliseconds; on a machine that swaps, seconds."""

END_WAIT_S: Final = 10.0
"""The zygote ends as soon as its control channel does; past this it is killed."""


class ZygoteGone(PlatformError):
    """The zygote has died or does not answer. Its workers died with it; `Zygote.respawn` starts a new one."""


class Zygote:
    """A process to fork workers from. Make one with `Zygote.fork`.

    Attributes:
        pid: its process id.
        pidfd: readable when it is dead; another one after `respawn`.
    """

    def __init__(self, preload: Sequence[str], search_path: str) -> None:
        self._preload = list(preload)
        self._search_path = search_path
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._ready = False
        self._told: set[str] = set()
        self.pid = 0
        self.pidfd = -1

    @classmethod
    def fork(cls, *, preload: Sequence[str] = (), search_path: str | None = None) -> Zygote:
        """Fork this process into a zygote, which then imports while the caller goes on.

        To be called once torch is imported, and before threads, logging and signal handlers are set up and
        anything is
        asked of CUDA: workers inherit the launcher's state of that moment. Where Python threads run already,
            the zygote is executed instead.

        Args:
            preload: modules for the workers, besides torch and torch._dynamo.
            search_path: where they are looked for first, usually the script's folder.
        """
        zygote = cls(preload, os.path.abspath(search_path) if search_path else "")
        if threading.active_count() > 1:
            logger.info("zygote: executed, not forked: this process has threads already")
            zygote._execute()
        else:
            zygote._fork()
        return zygote

    @property
    def alive(self) -> bool:
        return self.pidfd >= 0 and not _readable(self.pidfd, 0.0)

    def wait_ready(self) -> None:
        """Wait until the imports are done. Raises `UsageError` when a module cannot be imported,
        `ZygoteGone`."""
        with self._lock:
            self._wait_ready()

    def spawn(self, request: SpawnRequest) -> ForkedProcess:
        """Start a worker: forked if that is as good as a fresh process, else executed by the zygote.

        Either dies with the zygote, and the zygote with this process. Raises OSError as `subprocess.Popen`
        does when a command cannot be executed, `UsageError` as `wait_ready`, `ZygoteGone`.
        """
        with self._lock:
            self._wait_ready()
            process = self._spawn(request)
        reason = process.fresh_because
        if reason is not None and reason not in self._told:
            self._told.add(reason)
            logger.warning("worker started as a fresh process instead of a fork: %s", reason)
        return process

    def respawn(self) -> None:
        """Start a new zygote in the place of a dead one. Call it from any thread."""
        with self._lock:
            self._end()
            self._execute()

    def close(self) -> None:
        """End the zygote and what is left of its workers; idempotent."""
        with self._lock:
            self._end()

    def _fork(self) -> None:
        control, server_end = _control_pair()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        _linux.flush_c_stdio()
        gc.freeze()  # a collection would write to every page that is shared with the workers
        agent_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            control.close()
            _zygote_server.run_server(server_end, agent_pid, self._preload, self._search_path, forked=True)
        self._started(pid, control, server_end)

    def _execute(self) -> None:
        control, server_end = _control_pair()
        fd = server_end.fileno()
        module = _zygote_server.__name__
        command = [sys.executable, "-m", module, str(fd), str(os.getpid()), self._search_path, *self._preload]
        inherit = [(os.POSIX_SPAWN_DUP2, fd, fd)]
        pid = os.posix_spawn(sys.executable, command, os.environ, file_actions=inherit)
        self._started(pid, control, server_end)

    def _started(self, pid: int, control: socket.socket, server_end: socket.socket) -> None:
        server_end.close()
        self._control, self._ready = control, False
        self.pid, self.pidfd = pid, os.pidfd_open(pid)

    def _wait_ready(self) -> None:
        if self._ready:
            return
        message, _ = self._receive(READY_WAIT_S)
        if "preload_error" in message:
            self._end()
            raise UsageError(
                f"--preload {message['preload_error']}",
                valid="modules that a script could import",
                do="leave it out, or make it importable (PYTHONPATH, the script's folder)",
            )
        self._ready = True

    def _spawn(self, request: SpawnRequest) -> ForkedProcess:
        body = {
            "command": list(request.command),
            "env": dict(request.env),
            "cwd": request.cwd,
            "pass": list(request.pass_fds),
            "fork": request.fork,
        }
        with contextlib.ExitStack() as closing:

            def owned(fd: int) -> int:
                closing.callback(os.close, fd)
                return fd

            status, status_end = os.pipe()
            owned(status_end)
            try:
                streams = [
                    fd if _is_open(fd) else owned(os.open(os.devnull, os.O_RDWR))
                    for fd in (request.stdin, request.stdout, request.stderr)
                ]
                fds = [owned(_zygote_wire.body_to_fd(body)), status_end, *streams, *request.pass_fds.values()]
                message, received = self._ask({"op": "spawn"}, fds)
                pid, reason = _zygote_server.spawn_reply(message)
            except BaseException:
                os.close(status)
                raise
        return ForkedProcess(request.command, pid, received[0], status, reason)

    def _ask(self, message: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        if self._control is None:
            raise _gone("is not running")
        try:
            _zygote_wire.send(self._control, message, fds)
        except ConnectionError as error:
            raise _gone("has died") from error
        return self._receive(SPAWN_WAIT_S)

    def _receive(self, timeout_s: float) -> tuple[dict[str, Any], list[int]]:
        if self._control is None:
            raise _gone("is not running")
        if not _readable(self._control.fileno(), timeout_s):
            # A late answer would be taken for that to another request.
            self._end()
            raise _gone(f"has not answered within {timeout_s:.0f} s")
        received = _zygote_wire.receive(self._control)
        if received is None:
            raise _gone("has died")
        return received

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self.pidfd < 0:
            return
        if not _readable(self.pidfd, END_WAIT_S):
            os.kill(self.pid, 9)
            _readable(self.pidfd, END_WAIT_S)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        os.close(self.pidfd)
        self.pidfd = -1


def _gone(how: str) -> ZygoteGone:
    return ZygoteGone(f"the zygote (workers are forked from it) {how}", do="start another: Zygote.respawn()")


def _control_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _readable(fd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))
