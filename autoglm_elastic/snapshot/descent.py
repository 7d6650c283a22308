"""Which generation a manager's snapshots extend: the one it was given, or, without a launcher that counts them, a new
one whenever the program resumes (core/lineage.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import generations
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.errors import ElasticError, PlatformError
from autoglm_elastic.ports import Votes, VotesLost

_TIERS: Final = {True: "disk", False: "fresh"}


class _Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: int = -1
    failed: str = ""


class Descent:
    """`number`: the generation, once it is `decided`. `given`: somebody else counts them.

    Args:
        channel: the conversation in which ranks agree; nothing is said where the number is given.
    """

    def __init__(self, catalog: Catalog, votes: Votes, channel: int, number: int | None) -> None:
        self._catalog, self._votes, self._channel = catalog, votes, channel
        self.given = self.decided = number is not None
        self.number = number or 0

    def begin(self, entry: str | None) -> None:
        """Collective: a new generation that extends `entry`, from nothing when None. Raises ElasticError."""
        self._agree(lambda: self._extend(entry))

    def join(self) -> None:
        """Collective: the newest generation that there is, as if this were the process that began it. Raises
        ElasticError."""
        self._agree(lambda: max((record.number for record in self._catalog.records()), default=0))

    def _extend(self, entry: str | None) -> int:
        chosen = None if entry is None else self._catalog.entry(entry)
        return generations.extend(self._catalog, chosen, _TIERS[chosen is not None]).number

    def _agree(self, decide: Callable[[], int]) -> None:
        """Rank 0 decides, all hear of it."""
        told, failure = _Told(), None
        if self._votes.rank == 0:
            try:
                told = _Told(decide())
            except ElasticError as error:
                told, failure = _Told(failed=str(error)), error
        try:
            heard = self._votes.channel(self._channel).broadcast(
                fmt.encode(told) if self._votes.rank == 0 else None
            )
        except VotesLost as error:
            raise PlatformError(f"no agreement on the generation: {error}") from error
        told = fmt.decode(heard, _Told, "the generation")
        if told.failed:
            raise failure or PlatformError(f"rank 0: {told.failed}")
        self.number, self.decided = told.number, True
