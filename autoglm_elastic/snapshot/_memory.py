"""Memory to stage into, asked for where a keeper that does not answer holds nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from autoglm_elastic.errors import ElasticError, PlatformError
from autoglm_elastic.keeper import InProcess, Keeper, Segment

ANSWER_S: Final = 10.0
"""So long the training thread waits for a keeper that is being started or has to give memory, once: while it has not
answered, what is staged later is refused at once."""
PATIENCE_S: Final = 20.0
"""So long a snapshot waits that cannot be taken later: the last one of a job."""
FILL_BYTES_PER_S: Final = float(1 << 30)
"""Memory is touched once before it is used, at least so fast."""


class Staged(NamedTuple):
    """A segment, and who writes from it."""

    keeper: Keeper | InProcess
    segment: Segment


class _Request:
    """One question on its way. What comes when nobody waits any more is free for the next snapshot."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._answer: Staged | ElasticError | None = None
        self._left = False

    def run(self, open_: Callable[[], Keeper | InProcess], nbytes: int) -> None:
        answer: Staged | ElasticError
        try:
            keeper = open_()
            answer = Staged(keeper, keeper.segment(nbytes))
        except ElasticError as error:
            answer = error
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
            answer = PlatformError(f"memory for a snapshot: {type(error).__name__}: {error}")
        with self._changed:
            self._answer = answer
            if self._left and isinstance(answer, Staged):
                answer.keeper.give_back(answer.segment)
            self._changed.notify_all()

    def answered(self, timeout_s: float = 0.0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._answer is not None, timeout=timeout_s)

    def wait(self, timeout_s: float) -> Staged:
        with self._changed:
            self._changed.wait_for(lambda: self._answer is not None, timeout=timeout_s)
            if self._answer is None:
                self._left = True
                raise PlatformError(f"the keeper gave no memory within {timeout_s:.0f} s")
            if isinstance(self._answer, ElasticError):
                raise self._answer
            return self._answer


class MemorySource:
    """Where one thread gets its segments from.

    Args:
        open_: the line to the keeper; may take long.
        known: the keeper if there is one already; waits for nobody.
    """

    def __init__(
        self, open_: Callable[[], Keeper | InProcess], known: Callable[[], Keeper | InProcess | None]
    ) -> None:
        self._open, self._known = open_, known
        self._request: _Request | None = None

    def get(self, nbytes: int, *, patient: bool = False) -> Staged:
        """At once where there is memory from the snapshot before. Raises ElasticError.

        Args:
            patient: wait once more for what was asked for earlier in vain.
        """
        staged = self._at_hand(nbytes)
        if staged is None and self._request is not None:
            if not self._request.answered(PATIENCE_S if patient else 0.0):
                raise PlatformError("the keeper has not answered an earlier request for memory")
            staged = self._at_hand(nbytes)
        return self._asked(nbytes) if staged is None else staged

    def _at_hand(self, nbytes: int) -> Staged | None:
        keeper = self._known()
        segment = None if keeper is None else keeper.take(nbytes)
        return None if keeper is None or segment is None else Staged(keeper, segment)

    def _asked(self, nbytes: int) -> Staged:
        self._request = request = _Request()
        threading.Thread(
            target=request.run, args=(self._open, nbytes), name="autoglm-snapshot-memory", daemon=True
        ).start()
        return request.wait(ANSWER_S + nbytes / FILL_BYTES_PER_S)
