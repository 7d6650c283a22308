"""Where a run stands, from its files alone: works for a run of any age, on any machine that sees the
directory."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from autoglm_elastic.errors import UsageError
from autoglm_elastic.observe.events import EVENTS_NAME
from autoglm_elastic.observe.live import Follower
from autoglm_elastic.observe.text import count


class Rank(msgspec.Struct, kw_only=True):
    """One rank of the newest generation; `pid` 0: not known."""

    rank: int
    node: str
    local_rank: int
    pid: int
    state: str


class Status(msgspec.Struct, kw_only=True):
    """The newest that the log tells. `wall_time`: of its newest line. A job that was cut off stays "running"
    here."""

    run_id: str
    state: str
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
    messages: list[str]


def read(run_dir: str | os.PathLike[str], *, messages: int = 5) -> Status:
    """The status, with the last few messages. Raises UsageError when the directory holds no event log."""
    if not (Path(run_dir) / EVENTS_NAME).is_file():
        raise UsageError(
            f"no {EVENTS_NAME} in {run_dir}", valid="the run directory of a job (autoglm-run --run-dir)"
        )
    follower = Follower(run_dir)
    follower.read_all()
    view = follower.view
    return Status(
        run_id=view.run_id,
        state=view.tracker.job.value,
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
        messages=[message.text for message in list(view.messages)[-messages:]],
    )


def lines(status: Status) -> list[str]:
    """The status for people."""
    loss = "" if status.loss is None else f", loss {status.loss:.4f}"
    newest = "" if status.snapshot_step < 0 else f", newest of step {status.snapshot_step}"
    out = [
        f"run {status.run_id or '?'}: {status.state}, step {max(0, status.step)}{loss}",
        f"generation {status.generation}: {count(status.world_size, 'worker')};"
        f" {count(status.failures, 'failure')}, {status.recoveries} recovered from;"
        f" {count(status.snapshots, 'snapshot')}{newest}",
    ]
    out += [f"  rank {r.rank}  {r.state:<13} {r.node} pid {r.pid or '?'}" for r in status.ranks]
    out += [f"  {message}" for message in status.messages]
    return out
