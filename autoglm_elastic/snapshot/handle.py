"""What a caller of `CheckpointManager.save` holds of a snapshot, and what became of all of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

from autoglm_elastic.snapshot.commit import SaveResult
from autoglm_elastic.snapshot.staging import COPY_S, Staging


class Handle:
    """One `save`. Any thread may wait for it."""

    def __init__(self) -> None:
        self._staging: Staging | None = None
        self._decided = threading.Event()
        self._result = SaveResult(False, None, "undecided")
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[SaveResult], None]] = []

    def done(self) -> bool:
        return self._decided.is_set()

    def wait(self, timeout_s: float) -> SaveResult:
        """The result; an uncommitted one with a reason when it is not decided within `timeout_s`."""
        if not self._decided.wait(timeout_s):
            return SaveResult(False, None, f"not decided within {timeout_s} s")
        return self._result

    def add_done_callback(self, callback: Callable[[SaveResult], None]) -> None:
        """Calls `callback` with the result as soon as it is decided, at once if it is; what it raises is ignored. It
        is called from the thread that decides, which writes no other snapshot meanwhile."""
        with self._lock:
            if not self._decided.is_set():
                self._callbacks.append(callback)
                return
        with contextlib.suppress(Exception):
            callback(self._result)

    def wait_staged(self, timeout_s: float = COPY_S) -> bool:
        """Until whatever belongs to the snapshot may change, by anybody. False when that is not so in
        time."""
        return self._staging is None or self._staging.copied(timeout_s)

    def staged_by(self, staging: Staging) -> None:
        self._staging = staging

    def settle(self, result: SaveResult) -> None:
        with self._lock:
            self._result = result
            self._decided.set()
        for callback in self._callbacks:
            with contextlib.suppress(Exception):
                callback(result)


@dataclass(slots=True)
class Counts:
    """What became of the triggers on this rank."""

    committed: int = 0
    failed: int = 0
    coalesced: int = 0
