"""Which generation a manager's snapshots extend: the one it was given, or, without a launcher that counts them, a new
one whenever the program resumes (core/lineage.py)."""

from __future__ import annotations

from collections.abc import Callable

from autoglm_elastic.catalog import generations
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.ports import Votes
from autoglm_elastic.snapshot.word import of_rank_0


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
        self._agree(lambda: generations.newest_number(self._catalog))

    def _extend(self, entry: str | None) -> int:
        if entry is None:
            return generations.extend(self._catalog, None, "fresh").number
        return generations.extend(self._catalog, self._catalog.entry(entry), "disk").number

    def _agree(self, decide: Callable[[], int]) -> None:
        votes = self._votes.channel(self._channel)
        self.number = int(of_rank_0(votes, "the generation", lambda: str(decide())))
        self.decided = True
