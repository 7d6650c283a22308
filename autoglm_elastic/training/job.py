"""`Job`: what the user's function is given, for one generation.

Binds the rooms together (state, gradients, data, snapshots); every rule lives in one of them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from autoglm_elastic import wire
from autoglm_elastic.core.split import Cursor, weight
from autoglm_elastic.training import move, rng
from autoglm_elastic.training.agreement import Agreement
from autoglm_elastic.training.data import Batches, MapDataset
from autoglm_elastic.training.metrics import as_number
from autoglm_elastic.training.outcomes import MisuseError, WorldChanged
from autoglm_elastic.training.reduce import Reducer
from autoglm_elastic.training.rows import require_number
from autoglm_elastic.training.shard import shard_module
from autoglm_elastic.training.snapshots import OURS, SnapshotRequest, Snapshots
from autoglm_elastic.training.steps import Decision, StepControl

if TYPE_CHECKING:
    from autoglm_elastic.training.session import Session

M = TypeVar("M", bound=nn.Module)

LEAVE_SNAPSHOT_LIMIT_S: Final = 60.0
"""A planned world waits so long for the snapshot in flight, then it is given up: newcomers stand still
meanwhile."""

STOP_SNAPSHOT_LIMIT_S: Final = 600.0
"""Whoever asked us to stop kills us when that takes too long for him; this only bounds a disk that hangs."""

STOP_SNAPSHOTS_MAX: Final = 2
"""One that comes to nothing in a world that is whole is tried once more."""


class Job:
    """One generation of a training, as the function under `elastic.run` sees it.

    Attributes:
        rank, world, local_rank: of this worker in this generation; `world` is the number of workers.
        step: committed steps so far.
        generation: the number of this membership; it only grows.
        local_samples: samples of this rank in the batch at hand. With 0 the batch is a stand-in that counts
            for nothing.
        device: where this worker's tensors belong.
        plan, tier: what the generation resumed from and why; "live", "disk" or "fresh".
    """

    def __init__(
        self,
        session: Session,
        world: wire.World,
        agreement: Agreement,
        snapshots: Snapshots | None,
        phases_s: dict[str, float],
    ) -> None:
        self.rank, self.world, self.local_rank = world.rank, world.world_size, world.local_rank
        self.generation = world.generation
        self.device = _device(world.local_rank)
        self.plan = agreement.plan
        self.tier = agreement.plan.tier
        self._session, self._state = session, session.state
        self._snapshots = snapshots
        self._phases_s = phases_s
        self._entered_at = time.monotonic()
        self._restored_at = self._entered_at
        self._control = StepControl(self.world, self._wants)
        self._weight = 1.0 / self.world
        self.local_samples = 0
        self._pending: dict[str, Cursor] = {}
        self._reducers: list[Reducer] = []
        self._synchronized: list[nn.Module] = []
        self._hooks: list[Any] = []
        self._logged: dict[str, Any] = {}
        self._snapshot_wanted: SnapshotRequest | None = None
        self._started = False
        self._first_commit = True

    @property
    def step(self) -> int:
        return self._state.step

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints and writes results."""
        return self.rank == 0

    @property
    def should_stop(self) -> bool:
        """A stop was asked for; all ranks agree on the boundary at which `commit` leaves."""
        return self._session.stop_signal() is not None

    # Models and state.

    def replicate(self, module: M) -> M:
        """The same module, whose gradients from now on are the mean over the global batch, on every rank.

        In a training that begins, all ranks get rank 0's parameters and buffers; otherwise they come with
        `track`.
        """
        module.to(self.device)
        if self.world > 1:
            if self.tier == "fresh" and not self._state.tracks(module):
                move.broadcast([*module.parameters(), *module.buffers()], 0)
            self._reducers.append(
                Reducer(
                    module,
                    rank=self.rank,
                    world_size=self.world,
                    weight=lambda: self._weight,
                    slots=lambda: self._control.slots(self.step + 1),
                    arrived=self._control.arrived,
                    on_failure=self._collective_failed,
                    pool=self._session.pool,
                )
            )
        self._watch_first_forward(module)
        return module

    def shard(self, module: M, **options: Any) -> M:
        """The same module, its parameters sharded over the world (FSDP2).

        Args:
            module: children with parameters of their own are wrapped one by one, then the root; what is
                already wrapped stays as it is.
            options: as for `torch.distributed.fsdp.fully_shard`.
        """
        if self.tier == "fresh" and self.world > 1 and not any(p.is_meta for p in module.parameters()):
            module.to(self.device)
            move.broadcast([*module.parameters(), *module.buffers()], 0)
        shard_module(module, self.device, self.world, lambda: self._weight * self.world, options)
        self._control.begin(self.step + 1)
        self._watch_first_forward(module)
        return module

    def track(self, **objects: Any) -> None:
        """Make modules, optimizers and anything with `state_dict()` / `load_state_dict()` part of the job's
        state.

        They are restored here and now when there is something to resume from. All ranks track the same names
        in the same order, every time the function is entered. Raises StateMismatch when an object does not
        fit its state.
        """
        if OURS in objects:
            raise MisuseError(f"job.track({OURS}=…): the name is reserved", valid="any other name")
        self._agree_on_seed()
        self._state.track(
            objects,
            synchronized=lambda module: any(module is known for known in self._synchronized),
            alone=self.world == 1,
        )
        if self.tier != "fresh":
            self._seed_step()
        self._restored_at = time.monotonic()

    # Data and steps.

    def batches(
        self,
        dataset: MapDataset,
        global_batch_size: int,
        epochs: int = 1,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        name: str = "train",
    ) -> Iterator[Any]:
        """This rank's shares of the global batches, from where the job stands to the end of the last epoch.

        Args:
            dataset: map-style.
            global_batch_size: samples a step over all ranks; the last batch of an epoch may be smaller.
            epochs: passes over the data in all, not from here.
            num_workers: as of DataLoader; 0 loads in this process.
            name: of the cursor; give each data set its own when there are several.
        """
        self._agree_on_seed()
        known = self._session.cursors.get(name)
        cursor = known if known is not None else Cursor(0, 0, rng.derive(self._session.seed, len(name)))

        def taken(after: Cursor, local: int, total: int) -> None:
            self._pending[name] = after
            self._weight = weight(local, total)
            self.local_samples = local
            self._begin()

        batches = Batches(
            dataset,
            global_batch_size=global_batch_size,
            epochs=epochs,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=num_workers,
            collate_fn=collate_fn,
            rank=self.rank,
            world_size=self.world,
            cursor=cursor,
            taken=taken,
        )
        return iter(batches)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside only add up local gradients; the first one after it reduces their sum."""
        for reducer in self._reducers:
            reducer.enabled = False
        try:
            yield
        finally:
            for reducer in self._reducers:
                reducer.enabled = True

    def log(self, **values: Any) -> None:
        """Numbers to be written with the next committed step, as rank 0 gives them."""
        self._logged |= values

    def snapshot(self) -> SnapshotRequest:
        """Ask for a snapshot. All ranks take it at the same step boundary, at the latest the one after the
        next. Without a run directory none is taken."""
        self._snapshot_wanted = self._snapshot_wanted or SnapshotRequest()
        return self._snapshot_wanted

    def commit(self, **metrics: Any) -> None:
        """The step boundary: the step counts. Not a collective.

        Args:
            metrics: numbers (or tensors of one element) for the metrics of this step. `loss`, a mean over
                this rank's samples, is written and shown as the mean over the global batch, one step later.
                All others are written as rank 0 gives them.

        Raises:
            MisuseError: for what is no number.
            WorldChanged: to enter the next world; let it pass.
            SystemExit: 75 after a stop was agreed and the snapshot is durable.
        """
        values = metrics | self._logged
        for name, value in values.items():
            require_number(name, value)
        self._begin()
        if any(reducer.running for reducer in self._reducers):
            self._control.poison(MisuseError("a backward was interrupted by an error"))
        if self._control.failure is not None:
            self._give_up(self._control.failure)
        boundary = self.step + 1
        failure: BaseException | None = None
        decision = Decision()
        try:
            decision = self._control.decide(boundary)
        except (RuntimeError, ValueError) as error:
            failure = error
        self._session.cursors |= self._pending
        self._pending.clear()
        self._state.committed(self.generation)
        self._session.note_commit(self, values, self._weight, decision.loss)
        self._seed_step()
        if self._first_commit:
            self._first_commit = False
            self._session.note_resumed(self, self._phases())
        if failure is not None:
            self._give_up(failure)
        self._logged = {}
        if decision.stop:
            self._stop(values)
        if decision.snapshot:
            self._begin_snapshot(values)
        if decision.leave:
            self._wait_for_snapshot(LEAVE_SNAPSHOT_LIMIT_S)
            raise WorldChanged(self.generation, "a new world is there")
        if (reason := self._session.why_broken(self.generation)) is not None:
            raise WorldChanged(self.generation, reason)
        self._control.depart(boundary + 1)

    # For the session.

    def finish(self, last_snapshot: bool) -> None:
        """The function returned on all ranks: a last snapshot, if so agreed, and whatever is under way.

        Raises WorldChanged when a peer dies before it is durable: the next world ends with one of its own.
        """
        if last_snapshot:
            self._begin_snapshot({}, last=True)
        if self._snapshots is None or self._wait_for_snapshot(STOP_SNAPSHOT_LIMIT_S):
            return
        if (reason := self._session.why_broken(self.generation)) is not None:
            raise WorldChanged(self.generation, reason)

    @property
    def needs_last_snapshot(self) -> bool:
        return self._snapshots is not None and self._snapshots.newest_begun != self.step and self.step > 0

    @property
    def lacks_last_snapshot(self) -> bool:
        """What was begun at the last step has come to nothing; only after `finish`."""
        return self._snapshots is not None and self._snapshots.committed_step != self.step and self.step > 0

    def close(self) -> None:
        """Everything that hangs on the user's objects comes off."""
        for reducer in self._reducers:
            reducer.detach()
        self._session.pool.keep_only([flat for reducer in self._reducers for flat in reducer.flats])
        for hook in self._hooks:
            hook.remove()
        self._reducers, self._hooks = [], []

    def describe(self) -> dict[str, Any]:
        """Seed and cursors, as JSON."""
        return self._session.describe_job()

    # Inside.

    def _wants(self, boundary: int) -> list[float]:
        leave = self._session.next_world(self.generation)
        stop = self._session.stop_signal() is not None
        snapshots = self._snapshots
        due = snapshots is not None and (
            snapshots.due(boundary) or (self._snapshot_wanted is not None and not snapshots.busy)
        )
        return [float(leave), float(stop), float(due), *self._session.metrics.rows.numbers()]

    def _begin(self) -> None:
        """The first thing of a generation's first step: what was not tracked by now will not be."""
        if self._started:
            return
        self._started = True
        self._agree_on_seed()
        self._state.settle()
        self._seed_step()

    def _seed_step(self) -> None:
        rng.seed_step(self._session.seed, self.step, self.rank)

    def _agree_on_seed(self) -> None:
        """A job that begins takes rank 0's seed as it is when something first depends on it, so that the
        user's `manual_seed` counts wherever he has it."""
        if self.tier != "fresh" or self._session.seed_agreed:
            return
        seed = torch.tensor([torch.initial_seed() & 0x7FFF_FFFF_FFFF_FFFF])
        if self.world > 1:
            dist.broadcast(seed, 0)
        self._session.seed = int(seed)
        self._session.seed_agreed = True

    def _watch_first_forward(self, module: nn.Module) -> None:
        """A module that was replicated or sharded but not tracked is tracked when it is first used."""
        name = f"module{len(self._synchronized)}"
        self._synchronized.append(module)

        def before(used: nn.Module, _: Any) -> None:
            if used is not module:
                return  # a deep copy of it took the hook along
            hook.remove()
            if not self._state.tracks(module):
                self.track(**{name: module})

        hook = module.register_forward_pre_hook(before)
        self._hooks.append(hook)

    def _begin_snapshot(self, metrics: dict[str, Any], *, last: bool = False) -> None:
        if self._snapshots is None:
            return
        state, layouts = self._state.snapshot()
        state[OURS] = {"job": self.describe(), "layouts": layouts}
        numbers = {key: number for key, value in metrics.items() if (number := as_number(value)) is not None}
        handle = self._snapshots.begin(self.step, state, numbers, self._state.optimizers, last=last)
        if self._snapshot_wanted is not None:
            self._snapshot_wanted.begun(handle)
            self._snapshot_wanted = None

    def _stop(self, metrics: dict[str, Any]) -> NoReturn:
        """Leave as agreed, with a snapshot of this boundary. Raises WorldChanged when a peer is lost before it is
        durable: the next world stops with one of its own."""
        durable = False
        for attempt in range(STOP_SNAPSHOTS_MAX if self._snapshots is not None else 0):
            self._begin_snapshot(metrics, last=True)
            committed = self._wait_for_snapshot(STOP_SNAPSHOT_LIMIT_S)
            try:
                durable = self._session.is_durable(self, attempt, committed)
            except RuntimeError as error:
                self._give_up(error)
            if durable:
                break
            if (reason := self._session.why_broken(self.generation)) is not None:
                raise WorldChanged(self.generation, reason)
        self._session.stop(self, durable)

    def _wait_for_snapshot(self, limit_s: float) -> bool:
        """True when the newest snapshot is committed. The groups that its votes need must live until then."""
        return self._snapshots is not None and self._snapshots.wait(limit_s)

    def _collective_failed(self, error: BaseException) -> None:
        self._control.poison(error)
        self._give_up(error)

    def _give_up(self, error: BaseException) -> NoReturn:
        """The step cannot be counted. Raises WorldChanged where somebody can give us a new world, else
        `error`."""
        if not self._session.elastic or isinstance(error, MisuseError):
            raise error
        reason = self._session.why_broken(self.generation) or f"a collective failed: {error}"
        raise WorldChanged(self.generation, reason) from error

    def _phases(self) -> dict[str, float]:
        now = time.monotonic()
        return self._phases_s | {
            "state": self._restored_at - self._entered_at,
            "first_step": now - self._restored_at,
        }


def _device(local_rank: int) -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")
