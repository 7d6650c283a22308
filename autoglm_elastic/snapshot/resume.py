"""The newest snapshot that loads on every rank: tried one after the other, by all ranks together.

What a rank finds out while it reads, all have to know before they go on: one that took an older state than the others
would train something that never was."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.errors import CorruptSnapshot, PlatformError
from autoglm_elastic.ports import Votes, VotesLost
from autoglm_elastic.snapshot.load import LoadReport
from autoglm_elastic.snapshot.word import in_words


class _Next(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rank 0 to all: load `entry`; or else it is over, `failed` says why if nothing was loaded."""

    entry: str = ""
    failed: str = ""
    corrupt: bool = False


class _Found(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rank says of the entry: "" when it is loaded."""

    reason: str = ""
    corrupt: bool = False


def load_newest(
    votes: Votes,
    candidates: Callable[[], Iterable[str]],
    load: Callable[[str], LoadReport],
    rejected: Callable[[str, str], None],
) -> LoadReport | None:
    """Collective. None when there is no candidate: nothing was loaded anywhere then.

    Args:
        candidates: names of entries, the best first; asked on rank 0.
        load: of one entry, on this rank.
        rejected: told on rank 0 of an entry that is corrupt, and why.

    Raises:
        CorruptSnapshot: no candidate is whole, on all ranks.
        ElasticError: what `load` or `candidates` raised; on the other ranks PlatformError says whose it was.
    """
    try:
        lead = _Lead(votes, candidates, rejected) if votes.rank == 0 else None
        return _follow(votes, load, lead)
    except VotesLost as error:
        raise PlatformError(f"no agreement on the snapshot to resume from: {error}") from error
    except Exception:
        raise
    except BaseException:
        votes.leave()
        raise


def _follow(votes: Votes, load: Callable[[str], LoadReport], lead: _Lead | None) -> LoadReport | None:
    report: LoadReport | None = None
    own: Exception | None = None
    while True:
        told = votes.broadcast(fmt.encode(lead.next()) if lead else None)
        step = fmt.decode(told, _Next, "the snapshot to resume from")
        if step.failed:
            if step.corrupt:
                raise CorruptSnapshot(step.failed)
            raise own or (lead.failure if lead else None) or PlatformError(step.failed)
        if not step.entry:
            return report
        report, own = None, None
        try:
            report = load(step.entry)
        except Exception as error:  # noqa: BLE001 - raised when all ranks know of it
            own = error
        found = _Found()
        if own is not None:
            found = _Found(in_words(own), isinstance(own, CorruptSnapshot))
        all_found = votes.gather(fmt.encode(found))
        if lead is not None and all_found is not None:
            lead.hear(step.entry, [fmt.decode(one, _Found, "what a rank found") for one in all_found])


class _Lead:
    """Rank 0's part: what is next."""

    def __init__(
        self,
        votes: Votes,
        candidates: Callable[[], Iterable[str]],
        rejected: Callable[[str, str], None],
    ) -> None:
        self._votes, self._rejected = votes, rejected
        self._last = ""
        self._over: _Next | None = None
        self.failure: Exception | None = None
        try:
            self._names = list(candidates())
        except Exception as error:  # noqa: BLE001 - whatever it is: nobody waits for what is not said
            self.failure = error
            self._over = _Next(failed=in_words(error))
        self._count = 0

    def next(self) -> _Next:
        if self._over is not None:
            return self._over
        if self._count < len(self._names):
            self._count += 1
            return _Next(self._names[self._count - 1])
        if not self._count:
            return _Next()
        return _Next(failed=f"none of {self._count} snapshots is whole; {self._last}", corrupt=True)

    def hear(self, entry: str, found: list[_Found]) -> None:
        """What all ranks found in the entry."""
        wrong = [(rank, one) for rank, one in enumerate(found) if one.reason]
        corrupt = [one.reason for _, one in wrong if one.corrupt]
        if not wrong:
            self._over = _Next()
        elif corrupt:
            self._last = f"{entry}: {corrupt[0]}"
            self._rejected(entry, corrupt[0])
        else:
            rank, one = wrong[0]
            self._over = _Next(failed=f"rank {rank}: {one.reason}")
