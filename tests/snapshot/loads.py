"""What the ranks of a world do in the tests of loading together (run by ranks.py)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from autoglm_elastic.catalog import limits
from autoglm_elastic.errors import ElasticError, PlatformError
from autoglm_elastic.ports import BlobReader, StreamBlobs
from autoglm_elastic.snapshot import CheckpointManager, GroupVotes, messages, read, share
from autoglm_elastic.storage import open_blobs
from tests.snapshot.cases import WAIT_S, World, mesh_of, parse, state_of, values


def small_sizes() -> None:
    """What is megabytes otherwise: many chunks and messages for little data."""
    limits.CHUNK_BYTES, limits.SPLIT_BYTES_MIN = 64 << 10, 1 << 10  # type: ignore[misc]
    messages.MESSAGE_BYTES, messages._ALONE_BYTES = 32 << 10, 8 << 10  # type: ignore[misc]
    read._RUN_BYTES = 64 << 10  # type: ignore[misc]


def state(seed: int) -> dict[str, Any]:
    """3 MB of every kind: large, small, empty and strided tensors, and other values."""
    random = torch.Generator().manual_seed(seed)
    return {
        "large": torch.randn(600, 700, generator=random),
        "half": torch.randn(300, 300, generator=random).bfloat16(),
        "columns": torch.randn(200, 500, generator=random).t(),
        "steps": [torch.randn(size, generator=random) for size in (1, 7, 1000, 3)],
        "mask": torch.rand(9, 1001, generator=random) > 0.5,
        "complex": torch.randn(11, 13, generator=random, dtype=torch.complex64),
        "scalar": torch.tensor(seed),
        "none": torch.zeros(0, 4),
        "other": {"seed": seed},
    }


def blank(rank: int = 0) -> dict[str, Any]:
    """Nothing yet, in memory that is laid out otherwise by every second rank."""
    whole = state(0)
    for tensor in tensors_of(whole):
        tensor.zero_()
    whole["steps"][2] = torch.zeros(2000)[::2]
    if rank % 2:
        whole["large"] = torch.zeros(700, 600).t()
        whole["columns"] = torch.zeros(500, 200)
        whole["mask"] = torch.zeros(1001, 9, dtype=torch.bool).t()
    return whole


def tensors_of(whole: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in (*whole.values(), *whole["steps"]) if isinstance(value, torch.Tensor)]


def seed_of(whole: dict[str, Any]) -> int | None:
    """The seed that every value is of; None where they are mixed."""
    seed = int(whole["scalar"])
    pairs = zip(tensors_of(whole), tensors_of(state(seed)), strict=True)
    return seed if all(torch.equal(*pair) for pair in pairs) and whole["other"] == {"seed": seed} else None


class CountedReader:
    """A reader that counts; `before` is called with the bytes read so far."""

    def __init__(self, reader: BlobReader, blobs: CountedBlobs) -> None:
        self._reader, self._blobs = reader, blobs
        self.name, self.nbytes, self.block = reader.name, reader.nbytes, reader.block

    def read_into(self, offset: int, view: memoryview) -> None:
        self._reader.read_into(offset, view)

    def scatter_into(self, offset: int, views: Sequence[memoryview]) -> None:
        self._blobs.counted(sum(view.nbytes for view in views))
        self._reader.scatter_into(offset, views)

    def close(self) -> None:
        self._reader.close()


class CountedBlobs:
    """`blobs`, and how many bytes of chunks were read from them."""

    def __init__(self, blobs: StreamBlobs, before: Callable[[int], None] = lambda _: None) -> None:
        self._blobs, self._before, self._lock = blobs, before, threading.Lock()
        self.read_bytes = 0

    def counted(self, nbytes: int) -> None:
        with self._lock:
            self._before(self.read_bytes)
            self.read_bytes += nbytes

    def open(self, name: str) -> CountedReader:
        return CountedReader(self._blobs.open(name), self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blobs, name)


@contextmanager
def joined(world: World, blobs: CountedBlobs, *, timeout_s: float = WAIT_S) -> Iterator[CheckpointManager]:
    """A manager over a group that is left to die with the process where a test breaks it."""
    store = dist.FileStore(str(world.scratch / "store"), world.size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    votes = GroupVotes(dist.new_group(backend="gloo"), timeout_s=WAIT_S)
    with CheckpointManager(blobs, votes=votes) as manager:  # type: ignore[arg-type]
        yield manager


def save(world: World, *, seeds: list[int]) -> Any:
    small_sizes()
    with joined(world, CountedBlobs(open_blobs(world.run_dir))) as manager:
        for seed in seeds:
            result = manager.save(seed, state(seed)).wait(WAIT_S)
            if not result.committed:
                raise AssertionError(result.reason)
        dist.barrier()


def load(world: World, *, how: bool | None, url: str = "", environment: dict[str, str] | None = None) -> Any:
    """[the seed loaded, bytes read here as the store counts, as the report says]."""
    os.environ |= environment or {}
    small_sizes()
    blobs = CountedBlobs(open_blobs(url or world.run_dir))
    with joined(world, blobs) as manager:
        target = blank(world.rank)
        report = manager.load(target, together=how)
        dist.barrier()
        return [seed_of(target), blobs.read_bytes, report.nbytes]


def load_large(world: World, *, nbytes: int) -> Any:
    """With the sizes of the product."""
    blobs = CountedBlobs(open_blobs(world.run_dir))
    with joined(world, blobs) as manager:
        whole = torch.arange(nbytes // 8).view(-1, 1024)
        if not manager.save(1, {"a": whole}).wait(WAIT_S).committed:
            raise AssertionError("not saved")
        target = {"a": torch.zeros_like(whole)}
        manager.load(target, together=True)
        dist.barrier()
        return [torch.equal(target["a"], whole), blobs.read_bytes]


def reshard(world: World, *, dims: list[int], placements: list[str]) -> Any:
    """Saves and loads a state of DTensors and plain tensors. [right, bytes read here, bytes that it wanted]."""
    small_sizes()
    blobs = CountedBlobs(open_blobs(world.run_dir))
    with joined(world, blobs) as manager:
        mesh, where = mesh_of(world, dims), parse(placements)
        saved = state_of(mesh, values(3), where) | {"step": 3}
        if not manager.save(3, saved).wait(WAIT_S).committed:
            raise AssertionError("not saved")
        target = state_of(mesh, {name: torch.zeros_like(one) for name, one in values(0).items()}, where)
        manager.load(target, together=True)
        pairs = [(target["model"][name], saved["model"][name]) for name in saved["model"]]
        pairs += [
            (target["optim"]["state"][0][name], one) for name, one in saved["optim"]["state"][0].items()
        ]
        local = [tuple(getattr(one, "to_local", lambda one=one: one)() for one in pair) for pair in pairs]
        dist.barrier()
        right = all(torch.equal(*pair) for pair in local) and target["step"] == 3
        return [right, blobs.read_bytes, sum(one.nbytes for one, _ in local)]


def fail(world: World, *, rank: int, how: str) -> Any:
    """Rank `rank` fails when it has read a little. [the error's type and text, seconds, what is loaded then from the
    snapshot before or ""]."""
    small_sizes()
    failing = world.rank == rank

    def before(read_bytes: int) -> None:
        if failing and read_bytes > 64 << 10:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "error":
                raise PlatformError("reading: Input/output error")
            if how == "bug":
                raise ValueError("nobody thought of that")

    (world.scratch / f"pid{world.rank}").write_text(str(os.getpid()))
    if how == "stop":
        share.READ_S = 2.0  # type: ignore[misc]
    blobs = CountedBlobs(open_blobs(world.run_dir), before)
    with joined(world, blobs) as manager:
        target = blank(world.rank)
        if failing and how == "transit":
            spoil_one_message()
        dist.barrier()
        began = time.monotonic()
        error: Exception | None = None
        try:
            manager.load(target, together=True)
        except (ElasticError, ValueError) as raised:
            error = raised
        took = time.monotonic() - began
        if how == "stop":
            stopped = int((world.scratch / f"pid{rank}").read_text())
            os.kill(stopped, signal.SIGKILL)
        touched = any(bool(one.any()) for one in tensors_of(target))
        if how == "kill":
            stay_for_the_others(world, rank)
        again: Any = ""
        if how not in ("kill", "stop"):
            failing, older = False, blank(world.rank)
            manager.load(older, entry=manager.entries()[0].name, together=True)
            again = seed_of(older)
        return [type(error).__name__, str(error), took, again, touched]


def stay_for_the_others(world: World, dead: int) -> None:
    """So that nobody is freed by the end of another survivor's process."""
    store = dist.FileStore(str(world.scratch / "failed"), world.size)
    store.set(str(world.rank), "")
    store.wait([str(rank) for rank in range(world.size) if rank != dead], timedelta(seconds=WAIT_S))


def spoil_one_message() -> None:
    """Once, of what this rank passes on: one bit, on the way."""
    swap, spoiled = GroupVotes.swap, False

    def changed(votes: GroupVotes, out: memoryview, *places: Any, timeout_s: float) -> None:
        nonlocal spoiled
        if out.nbytes > 8 << 10 and not spoiled:
            out, spoiled = memoryview(bytearray(out)), True
            out[77] ^= 1
        swap(votes, out, *places, timeout_s=timeout_s)

    GroupVotes.swap = changed  # type: ignore[method-assign,assignment]
