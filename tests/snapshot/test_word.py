"""Whatever goes wrong at rank 0, the others hear of it: nobody waits for what is not said."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from autoglm_elastic.errors import UsageError
from autoglm_elastic.snapshot.resume import load_newest
from autoglm_elastic.snapshot.votes import SingleVotes
from autoglm_elastic.snapshot.word import of_rank_0


class Heard(SingleVotes):
    """What rank 0 says to all."""

    def __init__(self) -> None:
        self.said: list[bytes] = []

    def broadcast(self, payload: bytes | None) -> bytes:
        self.said.append(payload or b"")
        return super().broadcast(payload)


def failing(error: Exception) -> Callable[[], str]:
    def fail() -> str:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "words"), [(UsageError("no"), b'"no"'), (OSError("gone"), b'"OSError: gone"')]
)
def test_a_failure_is_told_before_it_is_raised(error: Exception, words: bytes) -> None:
    votes = Heard()
    with pytest.raises(type(error), match=str(error)):
        of_rank_0(votes, "a word", failing(error))
    with pytest.raises(type(error), match=str(error)):
        load_newest(votes, failing(error), lambda name: pytest.fail(name), lambda *_: None)
    assert len(votes.said) == 2
    assert all(words in said for said in votes.said)
