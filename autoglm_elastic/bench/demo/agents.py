"""The agents of the demo: real `autoglm-run` processes, watched through pidfds."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from autoglm_elastic.errors import PlatformError

STOP_WAIT_S: Final = 15.0
"""How long an agent may take to stop its workers when the demo ends early; then it is killed."""


class Agent:
    """One `autoglm-run`. Its output goes to a file of its own."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self.name, self.log = name, log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "autoglm_elastic.cli.run", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.pidfd = os.pidfd_open(self.process.pid)
        self.expected_dead = False

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, on purpose."""
        self.expected_dead = True
        self.process.kill()

    def close(self) -> None:
        """Stop it if it still runs, and wait for it."""
        if self.running:
            self.process.terminate()
            try:
                self.process.wait(STOP_WAIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(STOP_WAIT_S)
        os.close(self.pidfd)


class Agents:
    """All agents of the demo; none of them outlives the `with` block."""

    def __init__(self) -> None:
        self._all: list[Agent] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for agent in self._all:
            agent.close()
        self._all.clear()

    def start(self, name: str, arguments: Sequence[str], log: Path) -> Agent:
        agent = Agent(name, arguments, log)
        self._all.append(agent)
        return agent

    def running(self) -> list[Agent]:
        return [agent for agent in self._all if agent.running]

    def wait(self, timeout_s: float) -> None:
        """Until one of them ends, or the time is over."""
        with selectors.DefaultSelector() as selector:
            for agent in self.running():
                selector.register(agent.pidfd, selectors.EVENT_READ)
            selector.select(timeout_s)

    def check(self) -> None:
        """Raises PlatformError when an agent has failed that was not killed on purpose."""
        for agent in self._all:
            code = agent.process.poll()
            if code and not agent.expected_dead:
                raise PlatformError(f"agent {agent.name} ended with exit code {code}", do=f"tail {agent.log}")


class Watched:
    """Processes that are about to lose their agent. `wait_gone` tells how soon they were gone."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pidfds = [os.pidfd_open(pid) for pid in pids]

    def wait_gone(self, timeout_s: float) -> float | None:
        """Seconds until the last of them had ended; None when one outlives `timeout_s`."""
        start = time.monotonic()
        left = set(self._pidfds)
        with selectors.DefaultSelector() as selector:
            for pidfd in left:
                selector.register(pidfd, selectors.EVENT_READ)
            while left and time.monotonic() - start < timeout_s:
                for key, _ in selector.select(start + timeout_s - time.monotonic()):
                    selector.unregister(key.fd)
                    left.discard(key.fd)
        return None if left else time.monotonic() - start

    def close(self) -> None:
        for pidfd in self._pidfds:
            os.close(pidfd)


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
