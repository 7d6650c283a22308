"""A keeper's work in the rank's own process, where no keeper can be had. Same methods; what it has in flight
dies with the rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from autoglm_elastic.catalog import failpoints
from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import prepared as records
from autoglm_elastic.catalog.failpoints import Failpoints
from autoglm_elastic.catalog.removal import remove
from autoglm_elastic.coordination.clock import SystemClock
from autoglm_elastic.core.commit import Snapshot, Verdict
from autoglm_elastic.errors import PlatformError, UsageError
from autoglm_elastic.keeper import memory
from autoglm_elastic.keeper._pending import KeeperGone, Pending
from autoglm_elastic.keeper.client import Keeper, OnTold, ignore
from autoglm_elastic.keeper.finish import Finisher
from autoglm_elastic.keeper.job import WriteJob
from autoglm_elastic.keeper.memory import Memory, MemoryRefused
from autoglm_elastic.keeper.segments import Pool, Segment
from autoglm_elastic.keeper.writer import Result, Work, Writer
from autoglm_elastic.ports import StreamBlobs
from autoglm_elastic.settings import Keeper as KeeperSettings


class _Job:
    def __init__(self, job: WriteJob, rank: int, world_size: int) -> None:
        self.job, self.rank, self.world_size = job, rank, world_size
        self.pending = Pending()
        self.work: Work | None = None
        self.result: Result | None = None
        self.verdict: Verdict | None = None


class InProcess:
    """`Keeper` for one rank, without a process."""

    gone = ""

    def __init__(
        self,
        blobs: StreamBlobs,
        *,
        rank: int,
        world_size: int = 1,
        memory_max_bytes: int = 0,
        failpoint: Failpoints = failpoints.none,
    ) -> None:
        self._blobs, self._bytes_max = blobs, memory_max_bytes
        self._rank, self._world_size = rank, world_size
        self._writer = Writer(blobs, failpoint)
        self._finisher = Finisher(blobs, failpoint, SystemClock().wall)
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="autoglm-keeper")
        self._changed = threading.Condition()
        self._segments = Pool()
        self._jobs: list[_Job] = []
        self._next = 0

    def enter(self, *, rank: int, world_size: int, generation: int) -> None:
        """Jobs from now on are of this rank; the generation is in each job's snapshot."""
        del generation
        self._rank, self._world_size = rank, world_size

    def take(self, nbytes: int) -> Segment | None:
        """As `Keeper.take`."""
        with self._changed:
            return self._segments.take(nbytes)

    def segment(self, nbytes: int) -> Segment:
        """As `Keeper.segment`. Raises MemoryRefused, PlatformError."""
        with self._changed:
            found = self._segments.take(nbytes)
            if found is not None:
                return found
            small, held = self._segments.drop_free(), self._segments.used_nbytes
            self._next += 1
            number = self._next
        for one in small:
            one.held.close()
        reason = memory.refusal(nbytes, held, self._bytes_max)
        if reason:
            raise MemoryRefused(f"a segment of {nbytes} bytes: {reason}", do=memory.ADVICE)
        try:
            segment = Segment(number, Memory.create(nbytes))
        except OSError as error:
            raise PlatformError(f"a segment of {nbytes} bytes: {error.strerror}") from error
        with self._changed:
            self._segments.add(segment)
        return segment

    def give_back(self, segment: Segment) -> None:
        with self._changed:
            self._segments.give_back(segment.number)

    def write(self, job: WriteJob) -> Pending:
        """As `Keeper.write`."""
        mine = _Job(job, self._rank, self._world_size)
        with self._changed:
            is_written = any(one.job.segment == job.segment for one in self._jobs)
            try:
                segment = self._segments.for_job(job, is_written=is_written)
            except UsageError as error:
                mine.pending.settle((), error)
                return mine.pending
            self._jobs.append(mine)
            mine.work = self._writer.start(
                segment.memory, job.packs, mine.rank, lambda result: self._written(mine, result)
            )
        return mine.pending

    def settled(self, snapshot: Snapshot, verdict: Verdict) -> None:
        """As `Keeper.settled`."""
        with self._changed:
            for job in self._jobs:
                if job.job.snapshot == snapshot and job.verdict is None:
                    job.verdict = verdict
                    self._advance(job)

    def settle(self, timeout_s: float) -> bool:
        """As `Keeper.settle`, for what this rank left undecided."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not any(job.verdict for job in self._jobs), timeout=timeout_s
            )

    def close(self) -> None:
        """Ends the threads when their work is done; waits for none of it."""
        with self._changed:
            busy = {job.job.segment for job in self._jobs}
            for segment in self._segments.empty():
                if segment.number not in busy:
                    segment.held.close()
        self._writer.close()
        self._slow.shutdown(wait=False)

    def _written(self, job: _Job, result: Result) -> None:
        with self._changed:
            job.result = result
            error = PlatformError(result.reason) if result.reason else None
            job.pending.settle(result.packs, error, result.since)
            self._advance(job)

    def _advance(self, job: _Job) -> None:
        if job.result is None:
            if job.verdict is Verdict.ABORT and job.work is not None:
                job.work.stop.set()
        elif job.result.reason or job.verdict is Verdict.COMMIT:
            self._over(job)
        elif job.verdict is not None:
            self._later(self._take_back if job.verdict is Verdict.ABORT else self._finish, job)

    def _later(self, action: Callable[[_Job, Result], Any], job: _Job) -> None:
        result = job.result or Result()

        def act() -> None:
            try:
                action(job, result)
            except Exception:  # noqa: BLE001 - the snapshot does not happen; the catalog tells whoever asks
                return
            finally:
                with self._changed:
                    self._over(job)

        self._slow.submit(act)

    def _take_back(self, job: _Job, result: Result) -> None:
        del job
        remove(self._blobs, result.names)

    def _finish(self, job: _Job, result: Result) -> None:
        where = f"rank {job.rank}"
        prepared = fmt.decode(job.job.vote, fmt.Prepared, f"the vote of {where}")
        self._finisher.finish(
            job.job.snapshot,
            job.rank,
            job.world_size,
            msgspec.structs.replace(prepared, packs=result.packs, since=result.since),
            fmt.decode(job.job.details, records.Details, f"the details of {where}"),
        )

    def _over(self, job: _Job) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
            self._segments.give_back(job.job.segment)
        self._changed.notify_all()


def open_keeper(
    url: str,
    blobs: StreamBlobs,
    *,
    rank: int,
    world_size: int = 1,
    generation: int = 0,
    settings: KeeperSettings | None = None,
    on_told: OnTold = ignore,
) -> Keeper | InProcess:
    """The node's keeper, or, where none can be had, its work in this process; `on_told` hears why then.

    Args:
        url: as for `Keeper.ensure`.
        blobs: the same run directory, for the work in this process.
    """
    bytes_max = 0 if settings is None else settings.memory_max_bytes
    alone = InProcess(blobs, rank=rank, world_size=world_size, memory_max_bytes=bytes_max)
    if url.startswith("memory:"):  # no other process could see it
        return alone
    try:
        return Keeper.ensure(
            url, rank=rank, world_size=world_size, generation=generation, settings=settings, on_told=on_told
        )
    except KeeperGone as error:
        on_told("keeper.missing", {"rank": rank, "reason": str(error)})
        return alone
