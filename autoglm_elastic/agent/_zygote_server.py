"""The zygote's side: a small process that has imported what workers need and forks them when the agent asks.

It has one thread, no CUDA context and no OpenMP pool, so that a fork is as good as a fresh start. Three
events drive its only loop: a request, the death of a worker, the death of the agent. It never runs a worker's
code in itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn

from autoglm_elastic.agent import _linux, _threads, _zygote_state, _zygote_wire, worker_main
from autoglm_elastic.agent._fork_safety import fork_unsafe_reason, shadowed_module
from autoglm_elastic.agent.process import STATUS, PythonScript, SpawnRequest

_CRASHED: Final = 1


@dataclass(slots=True)
class _Child:
    """A worker. `status_fd`: where its exit status is written; the agent closes the other end when it has
    read it, and only then is the worker reaped, so that its pid stays its own for as long as the agent may
    signal it."""

    pid: int
    pidfd: int
    status_fd: int
    executed: subprocess.Popen[bytes] | None
    dead: bool = False
    forgotten: bool = False


class ZygoteServer:
    """The zygote process.

    Args:
        control: packets from and to the agent; its end means that the agent is gone.
        agent_pid: the agent, this process's parent.
        preload: modules to import for the workers.
        search_path: where they are looked for first; "" for nowhere.
        forked: from the agent, not executed.
    """

    def __init__(
        self,
        control: socket.socket,
        agent_pid: int,
        preload: Sequence[str],
        search_path: str,
        *,
        forked: bool,
    ) -> None:
        self._control = control
        self._agent_pid = agent_pid
        self._preload = preload
        self._search_path = search_path
        self._forked = forked
        self._children: dict[int, _Child] = {}

    def serve(self) -> NoReturn:
        """Import, tell the agent, and answer until it is gone."""
        state = _zygote_state.detach(self._agent_pid, self._control.fileno(), forked=self._forked)
        self._agent_pidfd = os.pidfd_open(self._agent_pid)
        try:
            self._prepared = _zygote_state.prepare(state, self._preload, self._search_path)
        except _zygote_state.PreloadError as error:
            _zygote_wire.send(self._control, {"preload_error": str(error)}, [])
            self._end()
        self._poller = select.poll()
        self._poller.register(self._control, select.POLLIN)
        self._poller.register(self._agent_pidfd, select.POLLIN)
        try:
            _zygote_wire.send(self._control, {"ready": True}, [])
        except ConnectionError:
            self._end()  # the launcher refused to go on while we imported
        while True:
            ready = {fd for fd, _ in self._poller.poll()}
            if self._agent_pidfd in ready:
                self._end()
            for child in list(self._children.values()):
                if not child.dead and child.pidfd in ready:
                    self._report_death(child)
                if not child.forgotten and child.status_fd in ready:
                    self._poller.unregister(child.status_fd)
                    child.forgotten = True
                if child.dead and child.forgotten:
                    self._reap(child)
            if self._control.fileno() in ready:
                self._answer()

    def _answer(self) -> None:
        received = _zygote_wire.receive(self._control)
        if received is None:
            self._end()
        _, (body_fd, status_fd, stdin, stdout, stderr, *passed) = received
        body = _zygote_wire.body_from_fd(body_fd)
        os.close(body_fd)
        request = SpawnRequest(
            body["command"],
            body["env"],
            body["cwd"],
            stdin,
            stdout,
            stderr,
            dict(zip(body["pass"], passed, strict=True)),
            body["fork"],
        )
        try:
            child, reason = self._start(request, status_fd)
        except OSError as error:
            os.close(status_fd)
            _zygote_wire.send(
                self._control,
                {"errno": error.errno, "strerror": error.strerror, "filename": error.filename},
                [],
            )
        else:
            self._children[child.pid] = child
            self._poller.register(child.pidfd, select.POLLIN)
            self._poller.register(child.status_fd, 0)
            _zygote_wire.send(self._control, {"pid": child.pid, "fresh_because": reason}, [child.pidfd])
        finally:
            for fd in (stdin, stdout, stderr, *passed):
                os.close(fd)

    def _start(self, request: SpawnRequest, status_fd: int) -> tuple[_Child, str | None]:
        script = request.python_script()
        reason = self._unsafe_reason(request, script)
        if script is None or reason is not None:
            executed = _execute(request)
            return _Child(executed.pid, os.pidfd_open(executed.pid), status_fd, executed), reason
        zygote_pid = os.getpid()
        detached, detached_end = os.pipe()
        try:
            pid = os.fork()
            if pid == 0:
                _detach_worker(zygote_pid, detached_end)
                os.close(detached)
                self._become_worker(request, script, status_fd)
        finally:
            os.close(detached_end)
        with open(detached, "rb", buffering=0) as end:
            # The agent may signal the worker's process group as soon as it has the answer: it must exist then.
            end.read(1)
        return _Child(pid, os.pidfd_open(pid), status_fd, None), None

    def _unsafe_reason(self, request: SpawnRequest, script: PythonScript | None) -> str | None:
        if script is not None:
            self._prepared.compute_threads.before_fork(request.env)
        facts = self._prepared.facts
        reason = fork_unsafe_reason(request, facts, threads=_threads.settled_threads(facts.threads))
        if reason is not None or script is None or sys.flags.safe_path:
            return reason
        folder = request.cwd or os.getcwd()
        if not script.module:
            folder = os.path.dirname(os.path.realpath(os.path.join(folder, script.path)))
        shadowed = shadowed_module(folder, facts.startup_modules)
        return f"{folder} has a module {shadowed!r} that differs from the one imported" if shadowed else None

    def _become_worker(self, request: SpawnRequest, script: PythonScript, status_fd: int) -> NoReturn:
        try:
            for target, fd in enumerate((request.stdin, request.stdout, request.stderr)):
                os.dup2(fd, target)
                os.close(fd)
            self._control.close()
            os.close(self._agent_pidfd)
            os.close(status_fd)
            for child in self._children.values():
                os.close(child.pidfd)
                os.close(child.status_fd)
            self._children.clear()
            env = {**request.env, **{name: str(fd) for name, fd in request.pass_fds.items()}}
            worker_main.become(script, env, request.cwd, self._prepared.state)
            self._prepared.compute_threads.after_fork(env)
        except BaseException:  # noqa: BLE001 - a half-made worker must not go on as a second zygote
            traceback.print_exc()
            os._exit(_CRASHED)
        worker_main.run(script)

    def _report_death(self, child: _Child) -> None:
        result = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if result is None:
            return
        status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        with contextlib.suppress(OSError):
            os.write(child.status_fd, STATUS.pack(status))
        self._poller.unregister(child.pidfd)
        child.dead = True

    def _reap(self, child: _Child) -> None:
        if child.executed is not None:
            child.executed.wait(0)
        else:
            os.waitpid(child.pid, os.WNOHANG)
        os.close(child.pidfd)
        os.close(child.status_fd)
        del self._children[child.pid]

    def _end(self) -> NoReturn:
        """The agent is gone: what it started goes with it, the worker's own children included."""
        for child in self._children.values():
            if not child.dead:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        os._exit(0)


def _detach_worker(zygote_pid: int, detached_end: int) -> None:
    """First thing in a worker: a session of its own, and no life without the zygote."""
    _linux.die_with_parent(zygote_pid)
    os.setsid()
    os.close(detached_end)


def _execute(request: SpawnRequest) -> subprocess.Popen[bytes]:
    """As torch starts a worker. Raises OSError."""
    fds = tuple(request.pass_fds.values())
    return subprocess.Popen(
        list(request.command),
        env={**request.env, **{name: str(fd) for name, fd in request.pass_fds.items()}},
        cwd=request.cwd,
        stdin=request.stdin,
        stdout=request.stdout,
        stderr=request.stderr,
        pass_fds=fds,
        start_new_session=True,
        # This process has one thread, so running Python between fork and exec is safe here.
        preexec_fn=partial(_linux.die_with_parent, os.getpid()),
    )


def run_server(
    control: socket.socket, agent_pid: int, preload: Sequence[str], search_path: str, *, forked: bool
) -> NoReturn:
    """Be the zygote; whatever happens, never return into a copy of the agent's code."""
    try:
        ZygoteServer(control, agent_pid, preload, search_path, forked=forked).serve()
    except BaseException:  # noqa: BLE001 - last resort of a process: say why, and leave
        traceback.print_exc()
    os._exit(_CRASHED)


def main(arguments: Sequence[str]) -> NoReturn:
    """`python -m autoglm_elastic.agent._zygote_server CONTROL_FD AGENT_PID SEARCH_PATH [MODULE ...]`."""
    control_fd, agent_pid, search_path, *preload = arguments
    control = socket.socket(fileno=int(control_fd))
    control.set_inheritable(False)
    run_server(control, int(agent_pid), preload, search_path, forked=False)


def spawn_reply(message: dict[str, Any]) -> tuple[int, str | None]:
    """(pid, why it was executed anew) of an answer to a request. Raises the OSError that starting it met."""
    if "errno" in message:
        raise OSError(message["errno"], message["strerror"], message["filename"])
    return message["pid"], message["fresh_because"]


if __name__ == "__main__":
    main(sys.argv[1:])
