"""The ranks' common answer to a trigger, without a message that the training thread has to wait for.

A thread carries rank 0's answers, one for each trigger; `core.triggers` says when another rank needs to hear one. May
touch the votes, in a conversation of its own.
"""

from __future__ import annotations

import queue
import threading
from typing import Final

from autoglm_elastic.core.triggers import Answering, Following
from autoglm_elastic.ports import Votes, VotesLost

_GO, _NO = b"go", b"no"
_IDLE_S: Final = 60.0
"""The thread looks up this often although it is woken for everything."""


class Triggers:
    """One rank's side. `trigger` and `begin` are for the training thread, the rest for any.

    Args:
        votes: not used before the first trigger.
        conversation: its channel that nobody else uses.
        limit: how many snapshots may be in flight.
        wait_s: bound of the wait for an answer.
    """

    def __init__(self, votes: Votes, conversation: int, limit: int, *, wait_s: float) -> None:
        self._votes, self._conversation, self._wait_s = votes, conversation, wait_s
        self._changed = threading.Condition()
        self._leading = Answering(limit)
        self._following = Following(limit)
        self._heard: tuple[int, bool | VotesLost] = (0, False)
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def trigger(self) -> bool:
        """Whether a snapshot begins, alike on all ranks. Raises VotesLost when that cannot be found out."""
        if self._votes.rank == 0:
            with self._changed:
                self._leading, go = self._leading.trigger()
            self._carry(_GO if go else _NO)
            return go
        self._carry(b"")
        with self._changed:
            self._following, answer = self._following.trigger()
            if answer is None:
                self._changed.wait_for(self._is_known, self._wait_s)
                answer = self._known()
            self._following = self._following.answer(answer)
            return answer

    def begin(self) -> None:
        """A snapshot begins without a trigger of ours: all ranks know that already."""
        with self._changed:
            self._leading, self._following = self._leading.begin(), self._following.begin()

    def ruling(self) -> int:
        """Rank 0 has decided a snapshot: what it has to tell the others with the ruling."""
        with self._changed:
            self._leading, answered = self._leading.ruled()
            return answered

    def ruled(self, answered: int) -> None:
        """Another rank has heard a ruling."""
        with self._changed:
            self._following = self._following.ruled(answered)
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """No trigger follows. Answers that are on their way still arrive, where that takes no longer than this."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)

    def _is_known(self) -> bool:
        return self._heard[0] >= self._following.number or self._following.expect() is not None

    def _known(self) -> bool:
        expected = self._following.expect()
        if expected is not None:
            return expected
        number, answer = self._heard
        if number < self._following.number:
            raise VotesLost(f"rank 0 did not answer a trigger within {self._wait_s:.0f} s")
        if isinstance(answer, VotesLost):
            raise answer
        return answer

    def _carry(self, word: bytes) -> None:
        if self._votes.world_size == 1:
            return
        self._queue.put(word)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="autoglm-snapshot-triggers", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        number = 0
        while True:
            try:
                word = self._queue.get(timeout=_IDLE_S)
            except queue.Empty:
                continue
            if word is None:
                return
            number += 1
            answer: bool | VotesLost
            try:
                answer = self._votes.channel(self._conversation).broadcast(word or None) == _GO
            except VotesLost as error:
                answer = error
            with self._changed:
                self._heard = (number, answer)
                self._changed.notify_all()
