"""Where a run stands. From its files alone: works for a run of any age, on any machine that sees the
directory. Whether it is still running the log cannot tell: the locks of its agents do (`presence`). From its store, on
any machine that reaches that: `agent/onlooker.py` fills in the same `Status`."""

from __future__ import annotations

import os
import threading
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol

import msgspec

from autoglm_elastic.core.lifecycle import TaskState
from autoglm_elastic.errors import UsageError
from autoglm_elastic.observe import presence
from autoglm_elastic.observe.events import EVENTS_NAME
from autoglm_elastic.observe.live import REFRESH_S, Follower
from autoglm_elastic.observe.text import count, duration, newest_step, shortened
from autoglm_elastic.observe.view import Incident, RunView

CUT_OFF: Final = "cut off"
_ENDS: Final = (TaskState.DONE, TaskState.FAILED, TaskState.PAUSED)
RANKS_SHOWN: Final = 64
INCIDENTS_SHOWN: Final = 5
LOOKS_MAX: Final = 3
"""A log that grows between two looks at it is looked at again, so often."""


class Rank(msgspec.Struct, kw_only=True):
    """One rank of the newest generation; `pid` 0: not known."""

    rank: int
    node: str
    local_rank: int
    pid: int
    state: str


class Node(msgspec.Struct, kw_only=True):
    """One node of the newest generation. `step`: the newest that its workers have committed, -1 when not known."""

    node: str
    host: str
    ranks: list[int]
    step: int = -1


class Status(msgspec.Struct, kw_only=True):
    """The newest that the log or the store tells. `wall_time`: of its newest line. `state` is "cut off" when the job
    has not ended and no agent is left. `alive` is None when that is not known: the agents that may be left are on other
    machines. What the store does not tell (`snapshots`, `agents`, `messages`) is None or empty."""

    run_id: str
    state: str
    alive: bool | None
    generation: int
    step: int
    steps_per_s: float | None
    loss: float | None
    world_size: int
    failures: int
    recoveries: int
    snapshots: int | None
    snapshot_step: int
    newest_by_tier: dict[str, int]
    """The newest step of which a whole state is held, by tier: `live`, `disk`."""
    wall_time: float
    nodes: list[Node]
    ranks: list[Rank]
    incidents: list[Incident]
    """The newest few, oldest first."""
    agents: list[presence.Agent]
    messages: list[str]


class Source(Protocol):
    """Where a status comes from. `wait`: until there may be something new, at most so long."""

    def status(self) -> Status: ...

    def wait(self, timeout_s: float) -> None: ...

    def close(self) -> None: ...


class RunDirectorySource:
    """The files of a run directory, read on as they grow. Raises UsageError when there is no event log."""

    def __init__(self, run_dir: str | os.PathLike[str], *, messages: int = 5) -> None:
        if not (Path(run_dir) / EVENTS_NAME).is_file():
            raise UsageError(
                f"no {EVENTS_NAME} in {run_dir}", valid="the run directory of a job (autoglm-run --run-dir)"
            )
        self._run_dir, self._messages = run_dir, messages
        self._follower = Follower(run_dir)
        self._closed = threading.Event()

    def wait(self, timeout_s: float) -> None:
        """Nothing tells when a file grows that another machine may write: it is looked at."""
        self._closed.wait(min(timeout_s, REFRESH_S))

    def close(self) -> None:
        self._closed.set()

    def status(self) -> Status:
        for _ in range(LOOKS_MAX):
            self._follower.read_all()
            seen = self._follower.view.wall_time
            agents = presence.read(self._run_dir)
            alive = presence.alive(agents)
            # An agent that began or ended between the two looks has written a line.
            self._follower.read_all()
            if alive or self._follower.view.wall_time == seen:
                break
        return _of_view(self._follower.view, agents, alive, self._messages)


def read(run_dir: str | os.PathLike[str], *, messages: int = 5) -> Status:
    """The status, with the last few messages. Raises UsageError when the directory holds no event log."""
    return RunDirectorySource(run_dir, messages=messages).status()


def ended(state: str) -> bool:
    """Whether nothing more will come."""
    return state in (CUT_OFF, *(each.value for each in _ENDS))


def _of_view(view: RunView, agents: list[presence.Agent], alive: bool | None, messages: int) -> Status:
    job = view.tracker.job
    state = CUT_OFF if alive is False and job not in _ENDS else job.value
    by_node: dict[str, list[int]] = {}
    for row in view.rows():
        by_node.setdefault(row.node, []).append(row.rank)
    hosts = {agent.node: agent.host for agent in agents}
    held = {"disk": view.snapshot_step} if view.snapshot_step >= 0 else {}
    if alive is not False and job not in _ENDS and view.step >= 0:
        held = {"live": view.step, **held}
    return Status(
        run_id=view.run_id,
        state=state,
        alive=alive,
        generation=view.generation,
        step=view.step,
        steps_per_s=view.steps_per_s if not ended(state) else None,
        loss=view.loss,
        world_size=view.world_size,
        failures=view.failures,
        recoveries=view.recoveries,
        snapshots=view.snapshots,
        snapshot_step=view.snapshot_step,
        newest_by_tier=held,
        wall_time=view.wall_time,
        nodes=[
            Node(node=node, host=hosts.get(node, ""), ranks=ranks, step=view.step)
            for node, ranks in by_node.items()
        ],
        ranks=[
            Rank(rank=r.rank, node=r.node, local_rank=r.local_rank, pid=r.pid, state=r.state.value)
            for r in view.rows()
        ],
        incidents=list(view.incidents),
        agents=agents,
        messages=[message.text for message in list(view.messages)[-messages:]],
    )


def _by_its_log_alone(status: Status) -> str:
    if status.alive is not None:
        return ""
    hosts = sorted({agent.host for agent in status.agents if agent.alive is None})
    return f" (by its log alone: whether its agents on {', '.join(hosts)} are alive is not seen from here)"


def lines(status: Status) -> list[str]:
    """The status for people."""
    loss = "" if status.loss is None else f", loss {status.loss:.4f}"
    rate = "" if not status.steps_per_s else f", {status.steps_per_s:.3g} steps/s"
    step = newest_step(status.step)
    if status.state == CUT_OFF:
        when = datetime.fromtimestamp(status.wall_time).strftime("%Y-%m-%d %H:%M:%S")
        stands = f"cut off, {step}, {when}{loss}; the same command goes on with it"
    else:
        stands = f"{status.state}, {step}{rate}{loss}{_by_its_log_alone(status)}"
    out = [
        f"run {status.run_id or '?'}: {stands}",
        f"generation {status.generation}: {count(status.world_size, 'worker')} on"
        f" {count(len(status.nodes), 'node')}; {count(status.failures, 'failure')}, {status.recoveries} recovered from;"
        f" {_snapshots(status)}",
    ]
    if status.alive is not False:
        out += _ranks(status)
    out += [f"  {incident_line(each)}" for each in status.incidents[-INCIDENTS_SHOWN:]]
    out += [f"  {message}" for message in status.messages]
    return out


def _snapshots(status: Status) -> str:
    newest = "" if status.snapshot_step < 0 else f" of step {status.snapshot_step}"
    if status.snapshots is None:
        return f"newest snapshot{newest}" if newest else "no snapshot"
    return count(status.snapshots, "snapshot") + (f", newest{newest}" if newest else "")


def incident_line(incident: Incident) -> str:
    """One incident in a line."""
    when = datetime.fromtimestamp(incident.opened).strftime("%H:%M:%S")
    if incident.seconds is not None:
        after = f"; back after {duration(incident.seconds)}"
    elif incident.restarted_s is not None:
        after = f"; all workers started again after {duration(incident.restarted_s)}"
    else:
        after = ""
    source = f", state {incident.tier} from step {incident.from_step}" if incident.tier else ""
    return f"{when} {shortened(incident.reason)}{after}{source}"


def _ranks(status: Status) -> list[str]:
    """A line a rank; of a large world a line a node, and in the end only how many there are."""
    if len(status.ranks) <= RANKS_SHOWN:
        return [f"  rank {r.rank}  {r.state:<13} {r.node} pid {r.pid or '?'}" for r in status.ranks]
    states: dict[str, Counter[str]] = {}
    for rank in status.ranks:
        states.setdefault(rank.node, Counter())[rank.state] += 1
    told = [
        f"  {node}  " + ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
        for node, counts in states.items()
    ]
    rest = len(told) - RANKS_SHOWN
    return told if rest <= 0 else [*told[:RANKS_SHOWN], f"  and {count(rest, 'node')} more"]
