"""Where a run stands, from its files alone: works for a run of any age, on any machine that sees the
directory. Whether it is still running the log cannot tell: the locks of its agents do (`presence`)."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from autoglm_elastic.core.lifecycle import TaskState
from autoglm_elastic.errors import UsageError
from autoglm_elastic.observe import presence
from autoglm_elastic.observe.events import EVENTS_NAME
from autoglm_elastic.observe.live import Follower
from autoglm_elastic.observe.text import count

CUT_OFF: Final = "cut off"
LOOKS_MAX: Final = 3
"""A log that grows between two looks at it is looked at again, so often."""


class Rank(msgspec.Struct, kw_only=True):
    """One rank of the newest generation; `pid` 0: not known."""

    rank: int
    node: str
    local_rank: int
    pid: int
    state: str


class Status(msgspec.Struct, kw_only=True):
    """The newest that the log tells. `wall_time`: of its newest line. `state` is "cut off" when the log does not
    end and no agent is left. `alive` is None when that is not known: the agents that may be left are on other
    machines."""

    run_id: str
    state: str
    alive: bool | None
    generation: int
    step: int
    loss: float | None
    world_size: int
    failures: int
    recoveries: int
    snapshots: int
    snapshot_step: int
    wall_time: float
    ranks: list[Rank]
    agents: list[presence.Agent]
    messages: list[str]


def read(run_dir: str | os.PathLike[str], *, messages: int = 5) -> Status:
    """The status, with the last few messages. Raises UsageError when the directory holds no event log."""
    if not (Path(run_dir) / EVENTS_NAME).is_file():
        raise UsageError(
            f"no {EVENTS_NAME} in {run_dir}", valid="the run directory of a job (autoglm-run --run-dir)"
        )
    follower = Follower(run_dir)
    for _ in range(LOOKS_MAX):
        follower.read_all()
        view, seen = follower.view, follower.view.wall_time
        agents = presence.read(run_dir)
        alive = _alive(agents)
        # An agent that began or ended between the two looks has written a line.
        follower.read_all()
        if alive or view.wall_time == seen:
            break
    state = view.tracker.job
    ended = state in (TaskState.DONE, TaskState.FAILED, TaskState.PAUSED)
    return Status(
        run_id=view.run_id,
        state=CUT_OFF if alive is False and not ended else state.value,
        alive=alive,
        generation=view.generation,
        step=view.step,
        loss=view.loss,
        world_size=view.world_size,
        failures=view.failures,
        recoveries=view.recoveries,
        snapshots=view.snapshots,
        snapshot_step=view.snapshot_step,
        wall_time=view.wall_time,
        ranks=[
            Rank(rank=r.rank, node=r.node, local_rank=r.local_rank, pid=r.pid, state=r.state.value)
            for r in view.rows()
        ],
        agents=agents,
        messages=[message.text for message in list(view.messages)[-messages:]],
    )


def _alive(agents: list[presence.Agent]) -> bool | None:
    if any(agent.alive for agent in agents):
        return True
    return None if any(agent.alive is None for agent in agents) else False


def _by_its_log_alone(status: Status) -> str:
    if status.alive is not None:
        return ""
    hosts = sorted({agent.host for agent in status.agents if agent.alive is None})
    return f" (by its log alone: whether its agents on {', '.join(hosts)} are alive is not seen from here)"


def lines(status: Status) -> list[str]:
    """The status for people."""
    loss = "" if status.loss is None else f", loss {status.loss:.4f}"
    newest = "" if status.snapshot_step < 0 else f", newest of step {status.snapshot_step}"
    step = max(0, status.step)
    if status.state == CUT_OFF:
        when = datetime.fromtimestamp(status.wall_time).strftime("%Y-%m-%d %H:%M:%S")
        stands = f"cut off at step {step}, {when}{loss}; the same command goes on with it"
    else:
        stands = f"{status.state}, step {step}{loss}{_by_its_log_alone(status)}"
    out = [
        f"run {status.run_id or '?'}: {stands}",
        f"generation {status.generation}: {count(status.world_size, 'worker')};"
        f" {count(status.failures, 'failure')}, {status.recoveries} recovered from;"
        f" {count(status.snapshots, 'snapshot')}{newest}",
    ]
    if status.alive is not False:
        out += [f"  rank {r.rank}  {r.state:<13} {r.node} pid {r.pid or '?'}" for r in status.ranks]
    out += [f"  {message}" for message in status.messages]
    return out
