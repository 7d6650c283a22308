"""What one worker process keeps from generation to generation, and the loop that enters them.

Wait for a world, build its groups, agree on what to resume from, call the user's function; when the world is
over, unwind and begin again. Only here a failed step is told from a user's error: an exception counts as the
world's end when the generation is known, or within a grace becomes known, to be broken.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import msgspec
import torch

from autoglm_elastic import wire
from autoglm_elastic.core.lineage import GenerationRecord
from autoglm_elastic.core.recovery import Holding
from autoglm_elastic.core.split import Cursor
from autoglm_elastic.errors import ExitCode
from autoglm_elastic.settings import Settings
from autoglm_elastic.training import endings, environment
from autoglm_elastic.training.agreement import (
    NEW_INTERVAL,
    Agreement,
    Held,
    Stored,
    agree,
    agree_on_end,
    as_event,
    of_rank_0,
)
from autoglm_elastic.training.control import Control
from autoglm_elastic.training.groups import Groups
from autoglm_elastic.training.job import Job
from autoglm_elastic.training.metrics import StepMetrics, told_by_all
from autoglm_elastic.training.outcomes import MisuseError, WorldChanged
from autoglm_elastic.training.reduce import BufferPool
from autoglm_elastic.training.rows import Row
from autoglm_elastic.training.snapshots import Snapshots
from autoglm_elastic.training.state import State
from autoglm_elastic.training.stopping import StopSignal

if TYPE_CHECKING:
    from autoglm_elastic.snapshot import Line

T = TypeVar("T")

GRACE_S_MIN: Final = 5.0
"""A peer's death is often noticed here before the agent tells; for so long a failed collective waits to be
explained."""

REASON_CHARS_MAX: Final = 300

WORLD_LIMIT_MARGIN_S: Final = 60.0
"""Beyond the time in which the leader must have sealed a world or failed the job."""


class Session:
    """One per process. `elastic`: a launcher can give us another world."""

    def __init__(self) -> None:
        text = os.environ.get(wire.ENV_SETTINGS)
        self.settings = Settings.from_json(text) if text else Settings()
        run_dir = os.environ.get(wire.ENV_RUN_DIR)
        self.run_dir = Path(run_dir) if run_dir else None
        self._control = Control.connect()
        board = os.environ.get(wire.ENV_BOARD_FD)
        self._board = wire.Board(int(board)) if board else None
        self.state = State()
        self.metrics = StepMetrics(self.run_dir)
        self.pool = BufferPool()
        self.cursors: dict[str, Cursor] = {}
        self.seed = 0
        self.seed_agreed = False
        self._random = torch.get_rng_state()
        self._initial_seed = torch.initial_seed()
        self._shard = (0, 0)
        self._snapshot_step = -1
        self._snapshots: Snapshots | None = None
        self._line: Line | None = None
        self._unwritten: tuple[dict[str, Any], ...] = ()
        self._interval = NEW_INTERVAL
        self._store: Any = None
        self._remains: list[Any] = []
        self._generation = -1
        self._signal = StopSignal()
        self._phases_s: dict[str, float] = {}

    @property
    def elastic(self) -> bool:
        return self._control is not None

    # The loop.

    def execute(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        """Enter `function(job, *args, **kwargs)` once for every world, until it returns."""
        if self._control is not None:
            if self._generation >= 0:
                raise MisuseError(
                    "elastic.run was called again after its function had ended",
                    valid="one training function in a job; put what comes after it into the same function",
                )
            self._control.send(wire.Hello(os.getpid()))
        with (
            contextlib.closing(self.metrics),
            contextlib.ExitStack() as leaving,
            self._signal.handled(self._worldless),
        ):
            leaving.callback(self._close_line)
            while True:
                world = self._next_world()
                over, value = self._one_generation(world, function, args, kwargs)
                if not over:
                    return value  # type: ignore[return-value]  # it is the function's own value then

    def _close_line(self) -> None:
        if self._line is not None:
            self._line.close()

    def _worldless(self) -> bool:
        return self._control is not None and self._control.waiting

    def _next_world(self) -> wire.World:
        if self._signal.number:
            raise SystemExit(128 + self._signal.number)
        if self._control is None:
            return environment.read_world(self._generation + 1)
        limit = self.settings.membership.join_timeout_s + WORLD_LIMIT_MARGIN_S
        return self._control.wait_world(self._generation, limit)

    def _one_generation(
        self, world: wire.World, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bool, T | None]:
        """(True, None) when the world is over, (False, value) when the function returned."""
        sealed_at = time.monotonic()
        if "unwound_at" in self._phases_s:
            self._phases_s["seal"] = sealed_at - self._phases_s.pop("unwound_at")
        self._generation = world.generation
        self._note(wire.RankState.RECOVERING if self.state.step else wire.RankState.WAITING)
        groups = Groups(
            world.generation, world.rank, world.world_size, self.settings.recovery.group_timeout_s
        )
        job: Job | None = None
        failed_at = 0.0
        try:
            if self._control is not None:
                self._control.send(wire.Entered(world.generation))
                self._control.enter(world.generation, lambda: self._break(groups))
            world, agreement = self._enter(world, groups)
            job = Job(self, world, agreement, self._snapshots, dict(self._phases_s))
            value = function(job, *args, **kwargs)
            self._finish(job, groups)
            return False, value
        except WorldChanged as changed:
            failed_at = time.monotonic()
            cause = changed.__cause__
            if isinstance(cause, Exception) and not self._is_over(world, cause, collective=True):
                raise cause from None
            endings.forget(changed)
        except Exception as error:
            failed_at = time.monotonic()
            if not self._is_over(world, error, collective=endings.is_collective(error)):
                raise
            endings.forget(error)
        finally:
            self._unwind(job, groups, sealed_at, failed_at)
        if self._control is not None:
            self._control.send(wire.Unwound(world.generation))
        return True, None

    def _enter(self, world: wire.World, groups: Groups) -> tuple[wire.World, Agreement]:
        """Groups, agreement and state for a generation."""
        started = time.monotonic()
        if self._control is not None:
            environment.write_world(world)
            groups.connect(world.master_addr, world.master_port)
        elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            groups.build_from_environment()
            world = msgspec.structs.replace(world, rank=groups.rank, world_size=groups.world_size)
        else:
            groups.build_alone()
        connected = time.monotonic()
        self._store = groups.store
        self._open_snapshots(world, groups)
        if self._control is None:
            world = self._number_without_launcher(world, groups)
        stored = self._snapshots if self._snapshots is not None else Stored()
        held = self._held(world)
        agreement = agree(groups.store, world.rank, world.world_size, world.generation, held, stored)
        planned = time.monotonic()
        if self._control is not None:
            groups.build()
            self._control.met()
        built = time.monotonic()
        self._phases_s |= {"group": (connected - started) + (built - planned), "plan": planned - connected}
        self._begin(world, agreement)
        return world, agreement

    def _open_snapshots(self, world: wire.World, groups: Groups) -> None:
        place = self.settings.snapshot.url or self.run_dir
        if place is None:
            return
        if self._line is None:
            from autoglm_elastic.snapshot import Line

            self._line = Line(place, settings=self.settings.keeper, on_event=self._emit)
        self._snapshots = Snapshots(
            self._line,
            generation=world.generation,
            rank=world.rank,
            world_size=world.world_size,
            settings=self.settings,
            votes_group=groups.votes,
            emit=self._emit,
        )
        if self.why_broken(world.generation) is not None:
            self._snapshots.broken()

    def _number_without_launcher(self, world: wire.World, groups: Groups) -> wire.World:
        """Without a launcher nobody seals generations: the next number after those on record."""
        if self._snapshots is None:
            return world
        if world.rank == 0:
            number = max((record.number for record in self._snapshots.records()), default=-1) + 1
            groups.store.set("number", str(number))
        number = int(groups.store.get("number"))
        self._generation = number
        self._snapshots.close()
        world = msgspec.structs.replace(world, generation=number)
        self._open_snapshots(world, groups)
        return world

    def _held(self, world: wire.World) -> Held:
        whole = self.state.holds
        rank, size = self._shard
        holding = Holding(
            rank=world.rank,
            node=f"{platform.node()}/{world.group_rank}",
            generation=self.state.generation if whole else -1,
            step=self.state.step if whole else -1,
            complete=whole,
            sharded=whole and self.state.sharded,
            shard=f"{rank}/{size}",
        )
        return Held(
            holding,
            self.describe_job(),
            self._initial_seed,
            tuple(self.state.names),
            size,
            self._unwritten,
            self.state.followed,
            self.metrics.lines(),
            self._interval,
        )

    def _begin(self, world: wire.World, agreement: Agreement) -> None:
        plan = agreement.plan
        load = None
        if self._snapshots is not None:
            self._unwritten = agreement.unwritten
            records = [GenerationRecord.from_json(data) for data in agreement.unwritten]
            self._interval = agreement.interval
            self._snapshots.resumed_at(max(plan.step, 0), records, agreement.interval)
        if agreement.entry is not None and self._snapshots is not None:
            load = self._snapshots.loader(agreement.entry)
            self._snapshot_step = plan.step
        self.state.begin(
            plan,
            world.rank,
            world.world_size,
            names=agreement.names,
            holders=agreement.holders,
            layouts=agreement.layouts,
            load=load,
            generation=world.generation,
        )
        self.seed = int(agreement.job["seed"])
        self.seed_agreed = plan.tier != "fresh"
        self.cursors = {name: Cursor(*numbers) for name, numbers in agreement.job["cursors"].items()}
        self._shard = (world.rank, world.world_size)
        if plan.tier == "fresh":
            torch.set_rng_state(self._random)
        if world.rank == 0:
            self._emit("plan.decided", as_event(plan, world.generation))
        self.metrics.enter(
            world.generation,
            world.rank,
            (self.state.generation, self.state.step),
            live=plan.tier == "live",
            told=agreement.lines,
        )
        self._note(wire.RankState.RUNNING)

    def _finish(self, job: Job, groups: Groups) -> None:
        """The function returned here. Nobody is done before everybody is: a rank that dies now finds us ready
        to help. Raises torch.distributed.DistError then."""
        needed = job.needs_last_snapshot
        if job.world > 1:
            needed = agree_on_end(groups.store, job.rank, job.world, job.step, needed)
        job.finish(needed)
        if not needed:
            lacking = job.lacks_last_snapshot
            if of_rank_0(groups.store, "finish/another", job.rank, job.world, lacking):
                job.finish(True)
        self._done(job, requeue=False)

    def _done(self, job: Job, *, requeue: bool) -> None:
        self._note(wire.RankState.DONE)
        self.metrics.close(told_by_all(self._store, job.rank, job.world, self.metrics.rows.tell()))
        if self._control is not None:
            self._control.send(wire.Done(job.generation, job.step, requeue))

    def _is_over(self, world: wire.World, error: Exception, *, collective: bool) -> bool:
        """Whether an exception is a consequence of the world's end rather than an error of the user's.

        `collective`: it came out of a collective, so that waiting for an explanation makes sense. That a peer is gone
        comes through the store, which may itself be lost for a while: meanwhile what this process holds is kept.
        """
        control = self._control
        if control is None:
            return False
        if control.why_broken(world.generation) is not None:
            return True
        if not collective:
            return False
        if control.next_world(world.generation) is not None:
            return True
        grace_s = max(GRACE_S_MIN, 3 * self.settings.membership.lease_s)
        if control.wait_over(world.generation, grace_s):
            return True
        if not endings.is_lost_peer(error):
            return False
        # Nobody has died, or nobody can say so at present: a new world is needed in any case.
        control.send(wire.Stranded(world.generation, str(error)[:REASON_CHARS_MAX]))
        return control.wait_over(world.generation, grace_s + self.settings.store.lost_limit_s)

    def _break(self, groups: Groups) -> None:
        """On the control thread: free whoever waits in this generation."""
        snapshots = self._snapshots
        if snapshots is not None:
            snapshots.broken()
        groups.break_()

    def _unwind(self, job: Job | None, groups: Groups, started_at: float, failed_at: float) -> None:
        told_at = self._control.told_at() if self._control is not None else 0.0
        if self._control is not None:
            self._control.leave()
            groups.break_()
        if job is not None:
            job.close()
        self.state.leave()
        if failed_at and (torn := self.state.torn):
            self._emit(
                "state.torn",
                {
                    "generation": groups.generation,
                    "rank": groups.rank,
                    "step": self.state.step,
                    "reason": torn,
                },
            )
        if self._snapshots is not None:
            self._interval = self._snapshots.interval(self._interval)
            self._snapshots.close()
            self._snapshots = None
        self._store = None
        self._remains += groups.close()
        self._note(wire.RankState.WAITING)
        now = time.monotonic()
        since = min(failed_at, told_at) if told_at > started_at else failed_at
        self._phases_s = {"unwind": max(0.0, now - since), "unwound_at": now} if failed_at else {}

    # What a job asks of us.

    def why_broken(self, generation: int) -> str | None:
        return None if self._control is None else self._control.why_broken(generation)

    def next_world(self, generation: int) -> bool:
        return self._control is not None and self._control.next_world(generation) is not None

    def stop_signal(self) -> int | None:
        """The signal that asks us to stop, or None."""
        if self._signal.number:
            return self._signal.number
        stop = self._control.stop if self._control is not None else None
        return stop.signal if stop is not None else None

    def describe_job(self) -> dict[str, Any]:
        cursors = {name: [cursor.epoch, cursor.sample, cursor.seed] for name, cursor in self.cursors.items()}
        return {"seed": self.seed, "cursors": cursors}

    def note_commit(
        self, job: Job, values: Mapping[str, Any], share: float, loss_sums: Sequence[float] | None
    ) -> None:
        """A step has committed. `share`: of this rank in its batch."""
        row = Row(job.step, job.generation, time.time(), job.world, share=share)
        self.metrics.committed(row, values, loss_sums)
        if self._snapshots is not None:
            self._snapshots.collect()
            self._snapshot_step = max(self._snapshot_step, self._snapshots.committed_step)
        self._note(wire.RankState.RUNNING)

    def note_resumed(self, job: Job, phases_s: dict[str, float]) -> None:
        """The first committed step of a generation. What is left of the old groups is let go now."""
        if self._control is not None:
            plan = job.plan
            self._control.send(
                wire.Resumed(
                    generation=job.generation,
                    step=job.step,
                    from_step=plan.step,
                    tier=plan.tier,
                    reason=plan.reason,
                    wall_time=time.time(),
                    phases_s=phases_s,
                )
            )
        self._remains.clear()

    def is_durable(self, job: Job, attempt: int, committed: bool) -> bool:
        """Whether the last snapshot is: `committed` as far as is known here, or by rank 0's word. So all leave alike.
        Raises torch.distributed.DistError when rank 0 is lost before."""
        try:
            return of_rank_0(self._store, f"stop/{attempt}", job.rank, job.world, committed) or committed
        except RuntimeError:
            if committed:
                return True
            raise

    def stop(self, job: Job, durable: bool) -> NoReturn:
        """Leave as agreed. Raises SystemExit: 75 with a durable snapshot, else 128 + signal."""
        number = self.stop_signal() or signal.SIGTERM
        self._done(job, requeue=durable)
        raise SystemExit(int(ExitCode.REQUEUE) if durable else 128 + number)

    def _emit(self, name: str, fields: dict[str, Any]) -> None:
        if self._control is not None:
            self._control.send(wire.Event(name, fields))

    def _note(self, state: wire.RankState) -> None:
        if self._board is not None:
            step = self.state.step or -1
            self._board.write(
                wire.BoardNote(
                    os.getpid(),
                    state,
                    self._generation,
                    step,
                    self._snapshot_step,
                    self.metrics.loss,
                    time.time(),
                )
            )
