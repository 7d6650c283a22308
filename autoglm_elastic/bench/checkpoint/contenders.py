"""Every way to save that is compared, behind one face: ours and torch's.

What a contender is given is the same: the live state, a new folder, a gloo group of its own, the optimizer.
What all owe: after `save` and `before_step` the parameters may change, and `durable_at` tells when everything was
committed and fsynced."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from autoglm_elastic import CheckpointManager
from autoglm_elastic.bench.checkpoint import peers, raw
from autoglm_elastic.bench.checkpoint.measure import now, own_group
from autoglm_elastic.bench.checkpoint.training import State
from autoglm_elastic.errors import PlatformError
from autoglm_elastic.snapshot import GroupVotes

WAIT_S: Final = 240.0
"""Bound of one snapshot; a contender that takes longer ends the benchmark."""


class Pending:
    """One snapshot on its way."""

    def __init__(self) -> None:
        self._decided = threading.Event()
        self._durable_at = 0.0
        self._problem = ""
        self.staged: Future[Any] | None = None

    def settle(self, problem: str = "") -> None:
        """Stamps the moment; called by whoever knows first."""
        self._durable_at = now()
        self._problem = problem
        self._decided.set()

    def before_step(self) -> None:
        """What the training thread has to wait for before parameters change."""
        if self.staged is not None:
            self.staged.result(timeout=WAIT_S)

    def durable_at(self) -> float:
        """When it was durable, on the clock of `measure.now`. Raises PlatformError when it failed."""
        if not self._decided.wait(WAIT_S):
            raise PlatformError(f"a snapshot was not durable within {WAIT_S:g} s")
        if self._problem:
            raise PlatformError(f"a snapshot failed: {self._problem}")
        return self._durable_at


class Saver:
    """One contender in one rank. `folder` is its own; `save` gets a new one below it each time."""

    def __init__(self, folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
        self.folder, self.optimizer = folder, optimizer
        self.group = own_group()

    def save(self, number: int, state: State) -> Pending:
        raise NotImplementedError

    def load(self, number: int, state: State) -> None:
        """Into the live tensors of `state`."""
        raise NotImplementedError

    def close(self) -> None:
        dist.destroy_process_group(self.group)

    def place(self, number: int) -> Path:
        return self.folder / f"{number:06d}"


class Ours(Saver):
    """`CheckpointManager`, one for all snapshots, as in a training."""

    overlap = False

    def __init__(self, folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
        super().__init__(folder, optimizer)
        self._manager = CheckpointManager(folder, votes=GroupVotes(self.group))

    def save(self, number: int, state: State) -> Pending:
        pending = Pending()
        more: dict[str, Any] = {"optimizers": [self.optimizer]} if self.overlap else {}
        handle = self._manager.save(number, state, **more)
        handle.add_done_callback(lambda result: pending.settle("" if result.committed else result.reason))
        return pending

    def load(self, number: int, state: State) -> None:
        report = self._manager.load(state)
        if report.step != number:
            raise PlatformError(f"loaded step {report.step} instead of {number}")

    def close(self) -> None:
        self._manager.close(WAIT_S)
        super().close()


class OursOverlapped(Ours):
    """The copy runs beside the next forward and backward; the optimizer waits for it."""

    overlap = True


class DcpSave(Saver):
    """Fsyncs its data files and `.metadata`, not the folder."""

    planner: Callable[[], DefaultSavePlanner | None] = staticmethod(lambda: None)

    def save(self, number: int, state: State) -> Pending:
        pending = Pending()
        dcp_save(state, checkpoint_id=self.place(number), process_group=self.group, planner=self.planner())
        pending.settle()
        return pending

    def load(self, number: int, state: State) -> None:
        dcp_load(state, checkpoint_id=self.place(number), process_group=self.group)


class DcpSaveCached(DcpSave):
    planner = staticmethod(lambda: DefaultSavePlanner(enable_plan_caching=True))


class DcpThread(DcpSave):
    """`async_save` as it comes: a thread writes a fresh copy."""

    kind = AsyncCheckpointerType.THREAD

    def stager(self) -> DefaultStager | None:
        return None

    def __init__(self, folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
        super().__init__(folder, optimizer)
        self._stager = self.stager()

    def save(self, number: int, state: State) -> Pending:
        pending = Pending()
        saved = async_save(
            state,
            checkpoint_id=self.place(number),
            process_group=self.group,
            async_checkpointer_type=self.kind,
            async_stager=self._stager,
        )
        if isinstance(saved, AsyncSaveResponse):
            pending.staged = saved.staging_completion
            saved = saved.upload_completion
        saved.add_done_callback(lambda done: pending.settle(_problem(done)))
        return pending

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
        super().close()


class DcpThreadReused(DcpThread):
    """The copy goes into memory that is kept from one snapshot to the next."""

    def stager(self) -> DefaultStager:
        return DefaultStager(_options(background=False))


class DcpThreadStaging(DcpThread):
    """The copy itself, too, is made by a thread, beside the next forward and backward."""

    def stager(self) -> DefaultStager:
        return DefaultStager(_options(background=True))


class DcpProcess(DcpThreadReused):
    """A process writes, from shared memory that is kept."""

    kind = AsyncCheckpointerType.PROCESS


def _options(*, background: bool) -> StagingOptions:
    return StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=True,
        use_async_staging=background,
        use_non_blocking_copy=False,
    )


def _problem(done: Future[Any]) -> str:
    error = done.exception()
    return f"{type(error).__name__}: {error}" if error else ""


class WholeFile(Saver):
    """One file of rank 0, fsynced by us with its folder; shards are gathered by every rank first."""

    write: Callable[[State, Path], None]

    def save(self, number: int, state: State) -> Pending:
        pending = Pending()
        whole = peers.whole(state)
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            type(self).write(whole, self.place(number))
            raw.sync_file(self.place(number))
        pending.settle()
        return pending


class TorchSave(WholeFile):
    write = staticmethod(peers.torch_save)

    def load(self, number: int, state: State) -> None:
        peers.torch_load(self.place(number), state)


class Safetensors(WholeFile):
    write = staticmethod(peers.safetensors_save)

    def load(self, number: int, state: State) -> None:
        peers.safetensors_load(self.place(number), state)


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    title: str
    make: type[Saver]
    kind: str = field(default="peer")
    """`ours`, `dcp` or `peer`: what the targets compare."""


OVERLAP: Final = "optimizers" in inspect.signature(CheckpointManager.save).parameters

SAVERS: Final = {
    one.name: one
    for one in (
        Contender("ours", "ours", Ours, "ours"),
        *([Contender("ours-overlap", "ours, copy overlapped", OursOverlapped, "ours")] if OVERLAP else []),
        Contender("dcp", "DCP save", DcpSave, "dcp"),
        Contender("dcp-thread", "DCP async_save, thread", DcpThread, "dcp"),
        Contender("dcp-reused", "DCP async_save, thread, reused stager", DcpThreadReused, "dcp"),
        Contender("dcp-staging", "DCP async_save, thread, staging in a thread", DcpThreadStaging, "dcp"),
        Contender("dcp-process", "DCP async_save, process", DcpProcess, "dcp"),
        Contender("torch", "torch.save, rank 0", TorchSave),
        Contender("safetensors", "safetensors.save_file, rank 0", Safetensors),
    )
}
QUICK: Final = ("ours", "ours-overlap", "dcp", "dcp-reused", "torch", "safetensors")
"""Of a smoke run: DCP's process alone takes ten seconds to start."""


def savers(*, quick: bool) -> list[Contender]:
    return [one for name, one in SAVERS.items() if name in QUICK or not quick]


SMALL_SAVERS: Final = {
    one.name: one
    for one in (
        Contender("ours", "ours", Ours, "ours"),
        Contender("dcp", "DCP save", DcpSave, "dcp"),
        Contender("dcp-cached", "DCP save, plans cached", DcpSaveCached, "dcp"),
    )
}
LOADERS: Final = {name: SAVERS[name] for name in ("ours", "dcp", "torch", "safetensors")}
