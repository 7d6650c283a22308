"""What the demo does to the running job: kills a worker, kills an agent, brings the agent back.

Every fault is noted in the run's event log just before it happens, so that the report knows when it was.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

from autoglm_elastic.bench.demo.agents import Agents, Watched
from autoglm_elastic.observe.events import EVENTS_NAME, EventLog, FaultInjected
from autoglm_elastic.observe.view import RunView

WORKER_DIES_AT: Final = 1 / 3
AGENT_DIES_AT: Final = 0.55
"""Not later, so that steps are left for the agent to come back."""
STEPS_ALONE: Final = 10
"""So many steps without it before the agent is started again."""
GONE_S_MAX: Final = 5.0
"""An agent's workers must have ended so soon after it."""

Act = Callable[[], bool]
"""Asked at every refresh; True once it is done."""


class Acts:
    """The three acts. `start` starts an agent by node name; `view` tells where the job is."""

    def __init__(
        self, agents: Agents, view: RunView, run_dir: Path, steps: int, start: Callable[[str], None]
    ) -> None:
        self._agents, self._view, self._start = agents, view, start
        self._steps = steps
        self._log = EventLog(run_dir / EVENTS_NAME, source="demo")
        self._broken = 0
        self._dead_node = ""
        self._alone_from: int | None = None
        self.workers_gone_s: float | None = None
        """How soon the killed agent's workers had ended; None when one did not, or before the act."""

    def in_order(self) -> list[Act]:
        return [self.kill_worker, self.kill_agent, self.bring_back]

    def kill_worker(self) -> bool:
        """SIGKILL the last worker of the node that hosts the store."""
        view = self._view
        if view.step < self._steps * WORKER_DIES_AT or not self._goes_on():
            return False
        victim = [row for row in view.rows() if row.node == view.store_host][-1]
        self._note(f"worker of rank {victim.rank} (pid {victim.pid})", victim.pid)
        os.kill(victim.pid, signal.SIGKILL)
        return True

    def kill_agent(self) -> bool:
        """SIGKILL the agent that does not host the store; the kernel ends its workers with it."""
        view = self._view
        if view.step < self._steps * AGENT_DIES_AT or not self._goes_on():
            return False
        agent = next(agent for agent in self._agents.running() if agent.name != view.store_host)
        self._dead_node = agent.name
        workers = Watched([row.pid for row in view.rows() if row.node == agent.name])
        try:
            self._note(f"agent {agent.name} (pid {agent.process.pid})", agent.process.pid)
            agent.kill()
            self.workers_gone_s = workers.wait_gone(GONE_S_MAX)
        finally:
            workers.close()
        return True

    def bring_back(self) -> bool:
        """Start the dead agent's command again, once the others have gone on for some steps."""
        view = self._view
        if not self._goes_on():
            return False
        if self._alone_from is None:
            self._alone_from = view.step
        if view.step < self._alone_from + STEPS_ALONE:
            return False
        self._start(self._dead_node)
        return True

    def _goes_on(self) -> bool:
        """Training runs, in a generation after the one that was broken last."""
        return self._view.resumed == self._view.generation > self._broken

    def _note(self, target: str, pid: int) -> None:
        self._broken = self._view.generation
        self._log.emit(FaultInjected(target=target, pid=pid, signal=signal.SIGKILL))
        self._log.close()
