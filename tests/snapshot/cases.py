"""What the ranks of a world do in the tests (run by ranks.py, each in a process of its own)."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from autoglm_elastic.catalog import limits
from autoglm_elastic.errors import ElasticError
from autoglm_elastic.snapshot import (
    CheckpointManager,
    GroupVotes,
    SafetensorsReader,
    SafetensorsWriter,
)
from autoglm_elastic.snapshot import copy as copying
from autoglm_elastic.snapshot.staging import Staging

WAIT_S = 30.0
ROWS, COLUMNS = 7, 5


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    directory: Path
    scratch: Path

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @contextmanager
    def group(self) -> Iterator[None]:
        store = dist.FileStore(str(self.scratch / "store"), self.size)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def manager(self, **options: Any) -> CheckpointManager:
        votes = GroupVotes(dist.new_group(backend="gloo"), timeout_s=WAIT_S)
        return CheckpointManager(self.run_dir, votes=votes, **options)


def mesh_of(world: World, dims: list[int]) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(dims))


def values(step: int) -> dict[str, torch.Tensor]:
    """The whole state of a step, the same in every world."""
    return {
        "rows": torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS) + 100 * step,
        "few": torch.arange(2 * 3, dtype=torch.bfloat16).view(2, 3) + step,
        "scalar": torch.tensor(step + 0.5),
        "large": torch.arange(600_000, dtype=torch.float32).view(-1, 6) + step,
        "small": torch.arange(4) + step,
    }


def state_of(mesh: DeviceMesh, whole: dict[str, torch.Tensor], placements: list[Any]) -> dict[str, Any]:
    """Some of it as DTensors, some plain and alike on every rank."""
    replicated = [Replicate()] * mesh.ndim
    return {
        "model": {
            "rows": distribute_tensor(whole["rows"], mesh, placements),
            "few": distribute_tensor(whole["few"], mesh, placements),
            "scalar": distribute_tensor(whole["scalar"], mesh, replicated),
        },
        "optim": {"state": {0: {"large": whole["large"].clone(), "small": whole["small"].clone()}}},
        "step": 0,
    }


def check(state: dict[str, Any], step: int) -> None:
    whole = values(step)
    for name, tensor in {**state["model"], **state["optim"]["state"][0]}.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not torch.equal(full, whole[name]):
            raise AssertionError(f"{name} of step {step} is {full}")
    if state["step"] != step:
        raise AssertionError(f"step {state['step']} instead of {step}")


def parse(placements: list[str]) -> list[Any]:
    return [Replicate() if text == "R" else Shard(int(text)) for text in placements]


def reshard(world: World, *, dims: list[int], placements: list[str], load: int | None, save: int) -> Any:
    """Loads step `load` in this world's layout, if any, and saves step `save`."""
    with world.group():
        mesh = mesh_of(world, dims)
        with world.manager() as manager:
            if load is not None:
                blank = {name: torch.zeros_like(tensor) for name, tensor in values(0).items()}
                state = state_of(mesh, blank, parse(placements))
                report = manager.load(state)
                if report.step != load:
                    raise AssertionError(f"loaded step {report.step}")
                check(state, load)
            state = state_of(mesh, values(save), parse(placements))
            state["step"] = save
            result = manager.save(save, state).wait(WAIT_S)
            dist.barrier()
            return [result.committed, result.reason]


def agree(world: World, *, saves: int) -> Any:
    """Saves as fast as it can: which are coalesced must be the same on all ranks."""
    with world.group(), world.manager() as manager:
        handles = [manager.save(step, {"a": torch.full((50_000,), float(step))}) for step in range(saves)]
        results = [handle.wait(WAIT_S).committed for handle in handles]
        dist.barrier()
        return results


def apart(world: World, *, first: int) -> Any:
    """A rank whose `save` has returned before the other one comes to it."""
    with world.group(), world.manager() as manager:
        store = dist.FileStore(str(world.scratch / "apart"), world.size)
        committed = []
        manager.resume({})
        for step in range(3):
            if world.rank != first:
                store.wait([f"saved/{step}"])
            handle = manager.save(step, {"a": torch.full((1000,), float(step))})
            if world.rank == first:
                store.set(f"saved/{step}", "")
            committed.append(handle.wait(WAIT_S).committed)
            dist.barrier()
        return committed


def agreed(world: World, *, saves: int) -> Any:
    """As training does it: rank 0 looks whether it is busy and tells the others in a message of its own."""
    with world.group(), world.manager() as manager:
        results = []
        for step in range(saves):
            word = torch.tensor([int(not manager.busy)])
            dist.broadcast(word, 0)
            if word.item():
                results.append(manager.save(step, {"a": torch.full((1000,), float(step))}, agreed=True))
        return [handle.wait(WAIT_S).committed for handle in results]


def disagree(world: World, *, how: str) -> Any:
    """Ranks whose states do not fit together; then a good one."""
    with world.group(), world.manager() as manager:
        bad: dict[str, Any] = {"a": torch.ones(8)}
        if world.rank == 1:
            bad = {
                "shape": {"a": torch.ones(9)},
                "object": {"a": object()},
                "extra": {"a": torch.ones(8), "only_here": torch.ones(1 << 19)},
                "raise": {"a": torch.ones(8).to("meta")},
            }[how]
        first = manager.save(1, bad).wait(WAIT_S)
        second = manager.save(2, {"a": torch.ones(8)}).wait(WAIT_S)
        return [first.committed, first.reason, second.committed]


def kill(world: World, *, rank: int, point: str, step: int) -> Any:
    """Step `step` commits; during the next snapshot `rank` is killed at `point`. The others report."""
    armed = False

    def failpoint(passed: str) -> None:
        if armed and world.rank == rank and passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    limits.SPLIT_BYTES_MIN = 16  # type: ignore[misc]
    store = dist.FileStore(str(world.scratch / "store"), world.size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    manager = world.manager(failpoint=failpoint)
    first = manager.save(step, {"a": torch.full((64,), float(step))}).wait(WAIT_S)
    if not first.committed:
        raise AssertionError(first.reason)
    dist.barrier()
    armed = True
    second = manager.save(step + 1, {"a": torch.full((64,), step + 1.0)}, agreed=True).wait(WAIT_S)
    closed = manager.close(WAIT_S)
    return [second.committed, second.reason, closed]


def kill_staged(world: World, *, step: int) -> Any:
    """Step `step` commits. All ranks are killed when the next snapshot is staged and the keeper has it, before any
    vote."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(world.scratch / "store"), world.size),
        rank=world.rank,
        world_size=world.size,
    )
    manager = world.manager()
    if not manager.save(step, kept_whole(step)).wait(WAIT_S).committed:
        raise AssertionError(f"step {step} failed")
    staged, hand_over = threading.Event(), Staging.hand_over

    def stop_behind(staging: Staging) -> None:
        hand_over(staging)
        staged.set()
        threading.Event().wait()

    Staging.hand_over = stop_behind  # type: ignore[method-assign]
    Staging.prepared = lambda *_: threading.Event().wait()  # type: ignore[assignment]
    manager.save(step + 1, kept_whole(step + 1), agreed=True)
    if not staged.wait(WAIT_S):
        raise AssertionError("not staged")
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def kept_whole(step: int) -> dict[str, Any]:
    """A state of which every value tells its step; large enough to be written by all ranks."""
    return {"a": torch.full((1 << 19,), float(step)), "b": torch.full((30,), step), "step": step}


CHANGES: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "whole": lambda parameters: parameters[0].add_(1),
    "alias": lambda parameters: parameters[0].detach().add_(1),
    "local": lambda parameters: parameters[0].to_local().add_(1),  # type: ignore[attr-defined]
    "foreach": lambda parameters: torch._foreach_add_(parameters, 1),
    "data": lambda parameters: parameters[0].data.to_local().add_(1),  # type: ignore[attr-defined]
}


def sharded(world: World, *, runs: list[tuple[dict[str, Any], str]]) -> Any:
    """Snapshots of FSDP2, one for each of `runs`: AdamW's options, and the change that is made right after the save,
    "" for nothing but the optimizer's step."""
    with world.group():
        return [_sharded(world, 10 * number, *run) for number, run in enumerate(runs)]


def _sharded(world: World, step: int, options: dict[str, Any], change: str) -> Any:
    """The copy of the shards stands still until the training thread takes part in it or has made the change."""
    mesh = mesh_of(world, [world.size])
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    optim = torch.optim.AdamW(net.parameters(), lr=0.1, **options)

    def backward() -> None:
        optim.zero_grad()
        net(torch.randn(4, 6)).square().mean().backward()

    backward()
    optim.step()
    state = {"net": net.state_dict(), "optim": optim.state_dict()["state"]}
    expected = full(state)
    with world.manager() as manager, held_copies() as (saved, go):
        first = manager.save(step, state, optimizers=[optim])
        saved.set()
        if change:
            with torch.no_grad():
                CHANGES[change](list(net.parameters()))
            go.set()
        else:
            backward()
            if go.is_set():
                raise AssertionError("nothing was left to copy")
            optim.step()
        result = first.wait(WAIT_S)
        changed = not same(full(state), expected)
        if change:
            expected = full(state)
            if not manager.save(step + 1, state, optimizers=[optim]).wait(WAIT_S).committed:
                raise AssertionError("the next one failed too")
        stored: dict[str, Any] = {}
        manager.load(stored)
        dist.barrier()
        return [result.committed, result.reason, same(stored, expected), changed]


@contextmanager
def held_copies() -> Iterator[tuple[threading.Event, threading.Event]]:
    """(to be set after the save, lets the copying thread go; another thread's copy after the save does so too)."""
    saved, go, copy = threading.Event(), threading.Event(), copying._copy

    def held(piece: list[Any]) -> None:
        if threading.current_thread().name == "autoglm-snapshot-copy":
            go.wait(WAIT_S)
        copy(piece)
        if saved.is_set():
            go.set()

    copying._copy, copying.PIECE_TENSORS = held, 2  # type: ignore[misc]
    try:
        yield saved, go
    finally:
        copying._copy = copy
        go.set()


def full(value: Any) -> Any:
    """A copy of a state, its tensors whole."""
    if isinstance(value, dict):
        return {key: full(item) for key, item in value.items()}
    return value.detach().full_tensor().clone() if isinstance(value, DTensor) else value.detach().clone()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(item, other[key]) for key, item in one.items())
    return torch.equal(one, other)


def dcp_round(
    world: World, *, save: int | None, dims: list[int], placements: list[str], asynchronous: bool
) -> Any:
    """torch.distributed.checkpoint as a user writes it: saves step `save`, or loads the newest."""
    warnings.simplefilter("ignore")
    with world.group():
        mesh = mesh_of(world, dims)
        if save is not None:
            state = state_of(mesh, values(save), parse(placements))
            state["step"] = save
            writer = SafetensorsWriter(step=save)
            if asynchronous:
                dcp.async_save(state, checkpoint_id=world.run_dir, storage_writer=writer).result(WAIT_S)
            else:
                dcp.save(state, checkpoint_id=world.run_dir, storage_writer=writer)
            return writer.entry
        blank = {name: torch.zeros_like(tensor) for name, tensor in values(0).items()}
        state = state_of(mesh, blank, parse(placements))
        dcp.load(state, checkpoint_id=world.run_dir, storage_reader=SafetensorsReader())
        check(state, state["step"])
        return state["step"]


def together(
    world: World,
    *,
    dims: list[int],
    placements: list[str],
    load: int,
    how: str = "",
) -> Any:
    """Loads step `load` with the others; [bytes read here, what was raised]. `how`: what goes wrong at rank 1."""
    with world.group():
        mesh = mesh_of(world, dims)
        votes = _DiesAtSwap if how == "dies" and world.rank == 1 else GroupVotes
        group = votes(dist.new_group(backend="gloo"), timeout_s=WAIT_S)
        with CheckpointManager(world.run_dir, votes=group) as manager:
            blank = {name: torch.zeros_like(tensor) for name, tensor in values(0).items()}
            state = state_of(mesh, blank, parse(placements))
            if how == "misfit" and world.rank == 1:
                state["model"]["not there"] = torch.zeros(1)
            try:
                report = manager.load(state, together=True)
            except ElasticError as error:
                return [-1, f"{type(error).__name__}: {error}"]
            check(state, load)
            return [report.nbytes, ""]


def from_store(world: World, *, url: str, environment: dict[str, str]) -> Any:
    """Saves a replicated state in an object store and loads it; the bytes read here."""
    os.environ.update(environment)
    with world.group():
        votes = GroupVotes(dist.new_group(backend="gloo"), timeout_s=WAIT_S)
        with CheckpointManager(url, votes=votes) as manager:
            if not manager.save(1, {"model": values(1)}).wait(WAIT_S).committed:
                raise AssertionError("not committed")
            dist.barrier()
            state = {"model": {name: torch.zeros_like(tensor) for name, tensor in values(0).items()}}
            report = manager.load(state)
            for name, tensor in values(1).items():
                if not torch.equal(state["model"][name], tensor):
                    raise AssertionError(name)
            return report.nbytes


class _DiesAtSwap(GroupVotes):
    """Killed as soon as it has told the others that its share is read."""

    swaps = 0

    def channel(self, number: int) -> GroupVotes:
        return _DiesAtSwap(self._group, timeout_s=WAIT_S, channel=number)

    def swap(self, out: memoryview, to: int, into: memoryview, source: int, *, timeout_s: float) -> None:
        if self.swaps == self.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        self.swaps += 1
        super().swap(out, to, into, source, timeout_s=timeout_s)
