"""What the ranks of a program without a launcher do in the tests (run by ranks.py, each in a process of its own)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from autoglm_elastic.errors import ElasticError
from autoglm_elastic.snapshot import CheckpointManager
from tests.snapshot.cases import WAIT_S, World

ROWS = 8


def state_of(step: int) -> dict[str, Any]:
    """Its rows are split over the ranks, in chunks of their own."""
    rows = torch.full((ROWS, 4), float(step))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"rows": distribute_tensor(rows, mesh, [Shard(0)]), "step": step}


def step_of(state: dict[str, Any]) -> int:
    """Raises AssertionError when it is of several steps."""
    found = {float(value) for value in state["rows"].to_local().flatten()} | {float(state["step"])}
    if len(found) != 1:
        raise AssertionError(f"a mixture of steps: {found}")
    return int(found.pop())


def save_all(manager: CheckpointManager, steps: list[int]) -> list[str]:
    """Why each was not committed, "" if it was."""
    return [manager.save(step, state_of(step)).wait(WAIT_S).reason for step in steps]


def run(world: World, *, saves: list[int], entry: str = "") -> Any:
    """Starts, resumes, saves, ends: [the step resumed from, reasons, events of rejected entries]."""
    rejected: list[str] = []

    def heard(name: str, fields: dict[str, Any]) -> None:
        if name == "snapshot.rejected":
            rejected.append(fields["entry"])

    with world.group():
        with CheckpointManager(world.run_dir, on_event=heard) as manager:
            state = state_of(-1)
            report = manager.resume(state, entry=entry or None)
            resumed = step_of(state)
            if resumed != (report.step if report else -1):
                raise AssertionError(f"{report}, but it is {resumed}")
            reasons = save_all(manager, saves)
        dist.barrier()
        return [resumed, reasons, rejected]


def fails(world: World, *, misfit: int = -1) -> Any:
    """What `resume` raises; the state of rank `misfit` has a key too many."""
    with world.group(), CheckpointManager(world.run_dir) as manager:
        state = state_of(-1)
        if world.rank == misfit:
            state["more"] = torch.zeros(1)
        try:
            manager.resume(state)
        except ElasticError as error:
            return [type(error).__name__, str(error)]
        return ["", ""]


def goes_back(world: World) -> Any:
    """Saves 1, 2, 3, goes back to 1 and saves another 2: [reasons, the newest then]."""
    with world.group(), CheckpointManager(world.run_dir) as manager:
        manager.resume(state_of(-1))
        reasons = save_all(manager, [1, 2, 3])
        dist.barrier()
        manager.resume(state_of(-1), entry="000000000001-g1")
        reasons += save_all(manager, [2])
        dist.barrier()
        newest = manager.newest()
        dist.barrier()
        return [reasons, newest.name if newest else ""]


def overtaken(world: World) -> Any:
    """One manager goes on while another has resumed: [the newest, what a third one resumes from]."""
    with world.group(), CheckpointManager(world.run_dir) as first:
        first.resume(state_of(-1))
        save_all(first, [1])
        dist.barrier()
        with CheckpointManager(world.run_dir) as second:
            second.resume(state_of(-1))
            save_all(second, [2])
            save_all(first, [2, 3, 4])
            dist.barrier()
            newest = second.newest()
        dist.barrier()
        with CheckpointManager(world.run_dir) as third:
            state = state_of(-1)
            third.resume(state)
        return [newest.name if newest else "", step_of(state)]


def subgroups(world: World) -> Any:
    """Two groups of two, each with a directory of its own: the worlds that were written."""
    with world.group():
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        mine = world.rank // 2
        folder = world.directory / str(mine)
        with CheckpointManager(folder, process_group=pairs[mine]) as manager:
            committed = manager.save(1, {"a": torch.ones(4)}).wait(WAIT_S).committed
            dist.barrier()
            sizes = [entry.world_size for entry in manager.entries()]
        try:
            CheckpointManager(folder, process_group=pairs[1 - mine])
        except ElasticError as error:
            return [committed, sizes, str(error)]
        return [committed, sizes, ""]


def without_resume(world: World, *, steps: list[int]) -> Any:
    with world.group(), CheckpointManager(world.run_dir) as manager:
        reasons = save_all(manager, steps)
        dist.barrier()
        return reasons


def names(run_dir: Path) -> list[str]:
    with CheckpointManager(run_dir) as manager:
        return [entry.name for entry in manager.entries()]
