"""CheckpointManager: snapshots of a run directory, for training and on its own.

`save` copies the state and returns; a thread of the manager writes, votes and commits. A snapshot that fails
is counted and reported and never raises into training. `load` verifies every byte that it hands over."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoglm_elastic.catalog import failpoints, limits
from autoglm_elastic.catalog.decide import Request
from autoglm_elastic.catalog.failpoints import Failpoints
from autoglm_elastic.catalog.format import CatalogEntry
from autoglm_elastic.catalog.housekeeping import Housekeeper
from autoglm_elastic.catalog.index import Catalog, OnEvent, no_event
from autoglm_elastic.catalog.verify import OnBytes, Problem, unwatched, verify
from autoglm_elastic.coordination.clock import SystemClock
from autoglm_elastic.core.commit import Snapshot, Verdict
from autoglm_elastic.core.lineage import GenerationRecord
from autoglm_elastic.core.retention import Retention
from autoglm_elastic.errors import ElasticError, PlatformError, UsageError
from autoglm_elastic.ports import Outcome, StreamBlobs, Votes, VotesLost
from autoglm_elastic.snapshot.commit import Commit, SaveResult
from autoglm_elastic.snapshot.descent import Descent
from autoglm_elastic.snapshot.dtypes import versions
from autoglm_elastic.snapshot.handle import Counts, Handle
from autoglm_elastic.snapshot.line import Line
from autoglm_elastic.snapshot.load import LoadReport, load_into
from autoglm_elastic.snapshot.resume import load_newest
from autoglm_elastic.snapshot.share import excused
from autoglm_elastic.snapshot.staging import Stager, Staging
from autoglm_elastic.snapshot.triggers import Triggers
from autoglm_elastic.snapshot.votes import GroupVotes, SingleVotes, group_of
from autoglm_elastic.snapshot.word import of_rank_0

_TRIGGERS, _LOADS, _SHARES = 1, 2, 3
"""Conversations beside the commit's own: may be held by the training thread while a commit is under way."""
_TURN_S: Final = 2.0
"""A snapshot that is decided may still be moving hints, or hear of its ruling; what takes longer hangs."""
_IDLE_S: Final = 60.0
"""The writer thread looks up this often although it is woken for everything."""


@dataclass(frozen=True, slots=True)
class _Job:
    request: Request
    staging: Staging | ElasticError
    handle: Handle
    began: float
    stall_s: float


class CheckpointManager:
    """Snapshots under `run_dir`. Every rank has one; all call `save` at the same step boundaries.

    Args:
        run_dir: the run directory, shared by all ranks: a path, a URL such as s3://bucket/run (docs/storage.md), or a
            `ports.StreamBlobs`.
        process_group: whose ranks take part; None for the default group, or this process alone where there is none. The
            constructor is a collective: it builds a gloo group of its own from it.
        votes: the ranks' transport, in place of such a group.
        generation: which one the snapshots extend, for a launcher that counts them; older ones are fenced off by the
            lineage. None leaves it to `resume`.
        in_flight_max: how many snapshots may be staged and not decided; each takes memory of its own.
        line: to the node's keeper, which outlives this manager; None for one of its own.
        on_event: called with (name, fields) from whatever thread; what it raises is ignored.
        retention: which snapshots are kept; rank 0 removes the others after each commit, in a thread of its own. None
            removes nothing.
        grace_s: what nothing reaches is removed no earlier (catalog/collect.py).
        failpoint: for tests (snapshot/failpoints.py).
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | StreamBlobs,
        *,
        process_group: dist.ProcessGroup | None = None,
        votes: Votes | None = None,
        generation: int | None = None,
        in_flight_max: int = limits.IN_FLIGHT_MAX,
        line: Line | None = None,
        on_event: OnEvent | None = None,
        retention: Retention | None = None,
        grace_s: float = limits.GRACE_S,
        failpoint: Failpoints = failpoints.none,
    ) -> None:
        self._listener = on_event or no_event
        self._own_line = line is None
        self._line = line or Line(run_dir, on_event=self._on_event, failpoint=failpoint)
        self._blobs: StreamBlobs = self._line.blobs
        group = group_of(process_group) if votes is None else None
        self._votes: Votes = votes or (SingleVotes() if group is None else GroupVotes(group))
        self._rank, self._world_size = self._votes.rank, self._votes.world_size
        self._failpoint = failpoint
        self._catalog = Catalog(self._blobs, self._on_event)
        self._descent = Descent(self._catalog, self._votes, _LOADS, generation)
        self._enter()
        self._wall = SystemClock().wall
        self._housekeeper = (
            Housekeeper(self._blobs, retention, grace_s=grace_s, wall=self._wall, on_event=self._on_event)
            if retention is not None and self._rank == 0
            else None
        )
        self._triggers = Triggers(self._votes, _TRIGGERS, in_flight_max, wait_s=limits.VOTE_S)
        self._stager = Stager(self._line, self._rank, self._world_size, failpoint)
        self._hook: Any = None
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._in_flight = 0
        self._in_flight_max = in_flight_max
        self._closed = self._left = False
        self._thread: threading.Thread | None = None
        self._told = 0
        """Coalesced triggers that an event has told of."""
        self.counts = Counts()

    @property
    def busy(self) -> bool:
        """As many snapshots of this rank as may be are not decided yet."""
        return self._in_flight >= self._in_flight_max

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        optimizers: Sequence[Optimizer] = (),
        metrics: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        kind: str = "full",
        config_digest: str | None = None,
        agreed: bool = False,
        patient: bool = False,
    ) -> Handle:
        """A snapshot of `state` as it is now. Returns when the state may change again, except by a step of
        `optimizers`. Never raises for a snapshot's failure: the handle tells.

        Args:
            step: the boundary; an entry is named by it and the generation, once.
            state: nested dicts and lists of tensors, DTensors and JSON values, alike on all ranks; plain
                tensors have the same content on all ranks.
            optimizers: what they alone change (their parameters and what they keep for each) is copied while
                training goes on; the next step of any optimizer waits for it. Whatever else changes it
                meanwhile makes the snapshot fail.
            metrics: for the catalog; what is not finite is left out.
            agreed: all ranks know already that rank 0 is not busy; otherwise rank 0 tells them in a message
            of its own.
        """
        began = monotonic()
        handle = Handle()
        refusal = self._admit(agreed)
        if refusal:
            handle.settle(SaveResult(False, None, refusal))
            return handle
        snapshot = Snapshot(step, self._descent.number)
        request = Request(
            snapshot,
            kind,
            {key: float(number) for key, number in (metrics or {}).items() if math.isfinite(number)},
            tuple(tags),
            config_digest,
            environment=versions(),
        )
        staging: Staging | ElasticError
        try:
            if (late := self._take_turn()) is not None:
                raise late
            if optimizers and self._hook is None:
                self._hook = register_optimizer_step_pre_hook(self._before_step)
            staging = self._stager.begin(request, state, optimizers, patient=patient)
            handle.staged_by(staging)
        except ElasticError as error:
            staging = error
        except Exception as error:  # noqa: BLE001 - also what a user's state_dict() raises: this rank votes abort
            staging = PlatformError(f"staging step {step}: {type(error).__name__}: {error}")
        with self._changed:
            self._jobs.append(_Job(request, staging, handle, began, monotonic() - began))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="autoglm-snapshot", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return handle

    def coalesced(self) -> None:
        """Count a trigger that found a snapshot in flight and did not come to `save`."""
        with self._changed:
            self.counts.coalesced += 1

    def _admit(self, agreed: bool) -> str:
        """Why no snapshot begins now, or "" when all ranks begin one."""
        with self._changed:
            if self._closed:
                return "the manager is closed"
        try:
            if not self._descent.decided:
                self._descent.join()
                self._enter()
            if agreed:
                self._triggers.begin()
            elif not self._triggers.trigger():
                self.coalesced()
                return "coalesced: another snapshot is in flight"
        except (VotesLost, ElasticError) as error:
            with self._changed:
                self.counts.failed += 1
            return str(error)
        return ""

    def _enter(self) -> None:
        self._line.enter(rank=self._rank, world_size=self._world_size, generation=self._descent.number)

    def _take_turn(self) -> ElasticError | None:
        """Reserves this rank for a snapshot that all ranks begin; why it can only vote against it here, if so."""
        with self._changed:
            free = self._changed.wait_for(lambda: not self.busy, timeout=_TURN_S)
            self._in_flight += 1
        return None if free else PlatformError(f"the snapshot before did not end within {_TURN_S:g} s")

    def _before_step(self, *_: object) -> None:
        self._stager.wait_copied()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    if self._closed:
                        return
                    self._changed.wait(_IDLE_S)
                job = self._jobs.popleft()
            result = SaveResult(False, None, "the writer failed")
            try:
                result = self._commit(job)
            finally:
                with self._changed:
                    self._in_flight -= 1
                    if result.committed:
                        self.counts.committed += 1
                    else:
                        self.counts.failed += 1
                    last = self._closed and not self._in_flight
                    self._changed.notify_all()
                job.handle.settle(result)
                if last:
                    self._leave()

    def _commit(self, job: _Job) -> SaveResult:
        snapshot = job.request.snapshot
        commit = Commit(
            self._blobs,
            self._catalog,
            self._votes,
            job.request,
            job.staging,
            failpoint=self._failpoint,
            wall=self._wall,
            triggers=self._triggers,
        )
        try:
            result = commit.run()
        except Exception as error:  # noqa: BLE001 - a bug in here is the snapshot's failure, not the training's
            result = SaveResult(False, None, f"{type(error).__name__}: {error}")
            if isinstance(job.staging, Staging):
                job.staging.settled(Verdict.UNKNOWN)
        where = {"step": snapshot.step, "generation": snapshot.generation}
        if commit.failed_here:
            self._on_event("snapshot.failed", {**where, "rank": self._rank, "reason": commit.failed_here})
        if self._rank == 0 and result.committed:
            took = {"nbytes": commit.nbytes, "seconds": monotonic() - job.began, "stall_s": job.stall_s}
            with self._changed:
                swallowed, self._told = self.counts.coalesced - self._told, self.counts.coalesced
            fields = {**where, "entry": result.entry, **took, "coalesced": swallowed}
            self._on_event("snapshot.committed", fields)
            if self._housekeeper is not None:
                self._housekeeper.request()
        elif self._rank == 0:
            self._on_event("snapshot.aborted", {**where, "reason": result.reason})
        return result

    def _on_event(self, name: str, fields: dict[str, Any]) -> None:
        try:
            self._listener(name, fields)
        except Exception:  # noqa: BLE001 - a listener's fault must not become the snapshot's
            return

    def load(
        self,
        state: MutableMapping[str, Any],
        *,
        entry: str | CatalogEntry | None = None,
        strict: bool = True,
        together: bool | None = None,
    ) -> LoadReport:
        """Loads a snapshot into `state`, in place, from any world size to any; every byte is verified.

        An empty dict or list and None in `state` are holes: they take what is stored there, tensors whole on
        the CPU.

        Args:
            entry: which one; None for the newest of the lineage, which rank 0 then chooses for all ranks.
            strict: refuse when `state` and snapshot do not have the same keys.
            together: ranks that want the same read each byte once and hand it on to each other; all ranks call `load`
                at the same time with the same snapshot. None does so where each rank would have to fetch it over a
                network (docs/storage.md) and rank 0 has chosen the snapshot.

        Raises UsageError (nothing is changed then) or CorruptSnapshot (`state` may be partly overwritten
        then)."""
        if together is None:
            together = entry is None and self._blobs.remote
        votes = self._votes.channel(_SHARES) if together and self._world_size > 1 else None
        named = entry or self._agree_on_newest()
        with excused(votes):
            chosen = named if isinstance(named, CatalogEntry) else self._catalog.entry(named)
            manifest = self._catalog.manifest(chosen)
        missing, unexpected, nbytes = load_into(
            self._blobs,
            manifest,
            state,
            strict,
            rank=self._rank,
            world_size=self._world_size,
            votes=votes,
        )
        return LoadReport(chosen.name, chosen.step, chosen.generation, missing, unexpected, nbytes)

    def resume(
        self, state: MutableMapping[str, Any], *, entry: str | None = None, strict: bool = True
    ) -> LoadReport | None:
        """Loads the newest snapshot of the lineage that is whole on every rank, and goes on from it: what is saved from
        now on is of a new generation that extends it, and what an earlier process of this program may still write is
        outside of the lineage. All ranks call it. None when there is no snapshot: `state` is as it was, and what is
        saved begins from nothing.

        For a program without a launcher, when it starts, and whenever it goes back to an older state. Not while
        something else writes to the directory: to look at a snapshot there is `load`.

        Args:
            entry: this one and no other; None for the newest. One that is corrupt is told of as `snapshot.rejected`,
                and the next older one is tried.
            strict: as in `load`.

        Raises:
            CorruptSnapshot: there are snapshots, and none of them is whole; `state` may be partly overwritten.
            ElasticError: on the rank where something else went wrong; PlatformError on the others.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._in_flight, timeout=limits.CLOSE_S)
        report = load_newest(
            self._votes.channel(_LOADS),
            lambda: [entry] if entry else [each.name for each in self._catalog.candidates()],
            lambda name: self.load(state, entry=name, strict=strict, together=self._blobs.remote),
            lambda name, why: self._on_event("snapshot.rejected", {"entry": name, "reason": why}),
        )
        if not self._descent.given:
            self._descent.begin(report.entry if report else None)
            self._enter()
        return report

    def _agree_on_newest(self) -> str:
        def find() -> str:
            newest = self.newest()
            return newest.name if newest else ""

        name = of_rank_0(self._votes.channel(_LOADS), "the snapshot to load", find)
        if not name:
            raise UsageError("the run directory has no snapshot", do="save one first")
        return name

    def entries(self) -> list[CatalogEntry]:
        """All committed snapshots of whatever lineage, oldest step first."""
        return self._catalog.entries()

    def records(self) -> list[GenerationRecord]:
        """The lineage's records. Raises CorruptSnapshot."""
        return self._catalog.records()

    def put_generation(self, record: GenerationRecord) -> Outcome:
        """OK (also when the same record is there), CONFLICT when another one took this number, UNKNOWN."""
        return self._catalog.put_generation(record)

    def newest(self) -> CatalogEntry | None:
        """The newest snapshot of the lineage, unverified."""
        return self._catalog.newest()

    def verify(
        self,
        entry: str | CatalogEntry,
        *,
        part: tuple[int, int] = (0, 1),
        on_bytes: OnBytes = unwatched,
    ) -> list[Problem]:
        """Reads every byte; empty when all are right.

        Args:
            part: (this one, how many), for several processes that check a part each.
            on_bytes: called with the number of bytes that were just checked; what it raises ends the check.
        """
        chosen = entry if isinstance(entry, CatalogEntry) else self._catalog.entry(entry)
        return verify(self._blobs, self._catalog, chosen, part=part, on_bytes=on_bytes)

    def newest_verified(self, candidates: Iterable[str | CatalogEntry] | None = None) -> CatalogEntry | None:
        """The first of `candidates` (default: the lineage, newest first) of which every byte verifies.

        Each that does not is reported as `snapshot.rejected`.
        """
        for candidate in self._catalog.candidates() if candidates is None else candidates:
            try:
                chosen = candidate if isinstance(candidate, CatalogEntry) else self._catalog.entry(candidate)
                problems = [str(problem) for problem in self.verify(chosen)]
            except ElasticError as error:
                problems = [str(error)]
            if not problems:
                return chosen
            name = candidate.name if isinstance(candidate, CatalogEntry) else candidate
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            self._on_event("snapshot.rejected", {"entry": name, "reason": problems[0] + more})
        return None

    def repair_hints(self) -> bool:
        """HEAD and `latest` show the newest snapshot of the lineage again."""
        return self._catalog.move_hints()

    def close(self, timeout_s: float = limits.CLOSE_S) -> bool:
        """Takes no more snapshots and waits for the one in flight. False when it was not decided in time; its
        thread is left behind then and ends when its votes do."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            idle = self._changed.wait_for(lambda: not self._in_flight, timeout=timeout_s)
        if self._housekeeper is not None:
            self._housekeeper.close(timeout_s)
        self._stager.close("the manager was closed")
        self._triggers.close(timeout_s)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if idle:
            self._leave()
        thread = self._thread
        if idle and thread is not None and thread is not threading.current_thread():
            thread.join(timeout=limits.CLOSE_S)
        return idle

    def _leave(self) -> None:
        """Nothing is in flight and nothing will be."""
        with self._changed:
            if self._left:
                return
            self._left = True
        self._stager.free()
        if self._own_line:
            self._line.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
