"""What rank 0 finds out, and all ranks have to know."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.errors import ElasticError, PlatformError
from autoglm_elastic.ports import Votes, VotesLost


class _Word(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    said: str = ""
    failed: str = ""


def in_words(error: Exception) -> str:
    """For the other ranks: never empty."""
    return str(error) if isinstance(error, ElasticError) else f"{type(error).__name__}: {error}"


def of_rank_0(votes: Votes, what: str, find_out: Callable[[], str]) -> str:
    """Collective: rank 0 finds out, all hear of it.

    Raises:
        PlatformError: what `find_out` raised, on the other ranks (on rank 0 it is raised as it is); on all when nothing
            could be heard.
    """
    word = _Word()
    failure: Exception | None = None
    if votes.rank == 0:
        try:
            word = _Word(find_out())
        except Exception as error:  # noqa: BLE001 - whatever it is: nobody waits for what is not said
            word, failure = _Word(failed=in_words(error)), error
    try:
        heard = votes.broadcast(fmt.encode(word) if votes.rank == 0 else None)
    except VotesLost as error:
        raise PlatformError(f"no agreement on {what}: {error}") from error
    word = fmt.decode(heard, _Word, what)
    if word.failed:
        raise failure or PlatformError(f"rank 0: {word.failed}")
    return word.said
