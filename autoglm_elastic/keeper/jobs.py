"""The life of a job in a keeper: written, then committed, taken back, or finished without its rank.

Everything here runs in the keeper's loop, except what is marked as a thread's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import msgspec

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import prepared as records
from autoglm_elastic.catalog.failpoints import Failpoints
from autoglm_elastic.catalog.removal import remove
from autoglm_elastic.core.commit import Snapshot, Verdict
from autoglm_elastic.keeper import messages
from autoglm_elastic.keeper.connections import Client
from autoglm_elastic.keeper.finish import Fate, Finisher
from autoglm_elastic.keeper.job import Layout
from autoglm_elastic.keeper.memory import Memory
from autoglm_elastic.keeper.messages import ProtocolError, one_line
from autoglm_elastic.keeper.writer import Result, Work, Writer
from autoglm_elastic.ports import StreamBlobs

JOBS_MAX: Final = 16
"""Of one client, not settled: two are in flight at most, the rest is slack."""


@dataclass(slots=True, eq=False)
class Job:
    """Packs of one rank. It is over when they are durable (or failed) *and* its snapshot's fate is known, or was
    found out here."""

    number: int
    owner: Client | None
    """None once its client died or left it to us."""
    snapshot: Snapshot
    rank: int
    world_size: int
    prepared: fmt.Prepared
    details: bytes
    memory: Memory
    work: Work | None = None
    result: Result | None = None
    verdict: Verdict | None = None
    owns_memory: bool = False
    """Its client died while it was written."""


class Jobs:
    """All jobs of a keeper.

    Args:
        answer: says something to a job's client.
        tell: (name, fields) for the event log.
        post: runs something in the loop.
        slow: threads for what may take a while.
    """

    def __init__(
        self,
        blobs: StreamBlobs,
        slow: ThreadPoolExecutor,
        *,
        failpoint: Failpoints,
        wall: Callable[[], float],
        answer: Callable[[Client, messages.Message], None],
        tell: Callable[[str, dict[str, int | float | str | bool | None]], None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._blobs, self._slow, self._failpoint = blobs, slow, failpoint
        self._answer, self._tell, self._post = answer, tell, post
        self._writer = Writer(blobs, failpoint)
        self._finisher = Finisher(blobs, failpoint, wall)
        self._all: set[Job] = set()

    def close(self) -> None:
        self._writer.close()

    @property
    def is_idle(self) -> bool:
        return not self._all

    @property
    def is_settled(self) -> bool:
        """Nothing is on its way for a client that died, or that has said its last word about it."""
        return all(job.owner is not None and job.verdict is None for job in self._all)

    def orphaned_nbytes(self) -> int:
        """Memory that no client owns any more."""
        return sum(job.memory.nbytes for job in self._all if job.owns_memory)

    def uses(self, segment: Memory) -> bool:
        """It is being written from, or may have to be."""
        return any(job.memory is segment and job.owner is not None for job in self._all)

    def start(self, job: Job, packs: Layout) -> None:
        """Raises ProtocolError when the client has too many, or one of that number."""
        numbers = [one.number for one in self._all if one.owner is job.owner]
        if job.number in numbers or len(numbers) >= JOBS_MAX:
            raise ProtocolError(f"job {job.number}: {len(numbers)} are not settled")
        self._all.add(job)
        self._failpoint("job_taken")
        job.work = self._writer.start(
            job.memory.view, packs, job.rank, lambda result: self._post(lambda: self._written(job, result))
        )

    def decide(self, client: Client, number: int, verdict: Verdict) -> None:
        """The client's last word; for a job that is over already: nothing."""
        for job in list(self._all):
            if job.owner is client and job.number == number and job.verdict is None:
                job.verdict = verdict
                self._advance(job)

    def bereave(self, client: Client) -> list[Memory]:
        """The client is gone: its jobs are ours. The memory that they still need."""
        needed = []
        for job in list(self._all):
            if job.owner is client:
                job.owner = None
                job.owns_memory = True
                needed.append(job.memory)
                job.verdict = job.verdict or Verdict.UNKNOWN
                self._advance(job)
        return needed

    def _written(self, job: Job, result: Result) -> None:
        job.result = result
        if job.owner is not None:
            if result.reason:
                self._answer(job.owner, messages.Failed(job.number, result.reason))
            else:
                self._answer(job.owner, messages.Wrote(job.number, result.packs, result.since))
        elif result.reason:
            self._tell_fate(job, Fate.ABORTED, result.reason)
        self._advance(job)

    def _advance(self, job: Job) -> None:
        """The next thing to do for a job of which something new is known."""
        if job.result is None:
            if job.verdict is Verdict.ABORT and job.work is not None:
                job.work.stop.set()
        elif job.result.reason or job.verdict is Verdict.COMMIT:
            self._over(job)
        elif job.verdict is not None:
            job.owner = None
            self._slow.submit(self._take_back if job.verdict is Verdict.ABORT else self._finish, job)

    def _over(self, job: Job) -> None:
        self._all.discard(job)
        if job.owns_memory:
            job.memory.close()

    def _take_back(self, job: Job) -> None:
        """In a thread."""
        try:
            if job.result is not None:
                remove(self._blobs, job.result.names)
        finally:
            self._post(lambda: self._over(job))

    def _finish(self, job: Job) -> None:
        """In a thread: the snapshot is finished without its rank."""
        fate, reason = Fate.WAITING, ""
        try:
            result = job.result or Result()
            details = fmt.decode(job.details, records.Details, f"the details of rank {job.rank}")
            prepared = msgspec.structs.replace(job.prepared, packs=result.packs, since=result.since)
            fate, reason = self._finisher.finish(job.snapshot, job.rank, job.world_size, prepared, details)
        except BaseException as error:  # noqa: BLE001 - told; the snapshot does not happen
            reason = one_line(error)
        finally:
            self._post(lambda: self._finished(job, fate, reason))

    def _finished(self, job: Job, fate: Fate, reason: str) -> None:
        self._tell_fate(job, fate, reason)
        self._over(job)

    def _tell_fate(self, job: Job, fate: Fate, reason: str) -> None:
        where = {"step": job.snapshot.step, "generation": job.snapshot.generation, "rank": job.rank}
        self._tell("snapshot.finished", {**where, "fate": fate.value, "reason": reason})
