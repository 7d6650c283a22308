"""The segments that one rank holds: which are free, which are being filled or written.

Pure bookkeeping; not thread safe: whoever owns a pool holds his own lock."""

from __future__ import annotations

from autoglm_elastic.errors import UsageError
from autoglm_elastic.keeper.job import WriteJob, check_layout
from autoglm_elastic.keeper.memory import Memory


class Segment:
    """Shared memory for one snapshot of this rank. `memory` is writable, page aligned, present."""

    def __init__(self, number: int, memory: Memory) -> None:
        self.number, self.nbytes = number, memory.nbytes
        self.memory = memory.view
        self.held = memory


class Pool:
    def __init__(self) -> None:
        self._free: dict[int, Segment] = {}
        self._used: dict[int, Segment] = {}

    @property
    def used_nbytes(self) -> int:
        return sum(one.nbytes for one in self._used.values())

    def take(self, nbytes: int) -> Segment | None:
        """The smallest free one of at least `nbytes`."""
        fitting = [one for one in self._free.values() if one.nbytes >= nbytes]
        if not fitting:
            return None
        found = min(fitting, key=lambda one: one.nbytes)
        self._used[found.number] = self._free.pop(found.number)
        return found

    def drop_free(self) -> list[Segment]:
        """The free ones, which are the caller's to close: they have become too small."""
        small, self._free = list(self._free.values()), {}
        return small

    def add(self, segment: Segment) -> None:
        """A new one, in use."""
        self._used[segment.number] = segment

    def give_back(self, number: int) -> None:
        """Nobody reads or fills it any more."""
        segment = self._used.pop(number, None)
        if segment is not None:
            self._free[number] = segment

    def for_job(self, job: WriteJob, *, is_written: bool) -> Segment:
        """The job's segment. Raises UsageError when it is not in use here, is being written (`is_written`), or does
        not hold what the job says."""
        segment = self._used.get(job.segment)
        if segment is None or is_written:
            raise UsageError(f"segment {job.segment}", valid="one that is ours and not being written")
        check_layout(job.packs, segment.nbytes)
        return segment

    def empty(self) -> list[Segment]:
        """All, which are the caller's to close."""
        everything = [*self._free.values(), *self._used.values()]
        self._free, self._used = {}, {}
        return everything
