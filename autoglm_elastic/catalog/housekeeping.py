"""Garbage collection beside a running job: a thread that makes a pass after each committed snapshot.

It never delays training or a snapshot, a pass is bounded (limits.py), and what fails in it is an event."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.collect import Collected, Collector
from autoglm_elastic.catalog.index import OnEvent
from autoglm_elastic.core.retention import Retention
from autoglm_elastic.errors import ElasticError, PlatformError
from autoglm_elastic.ports import AgingBlobs, StreamBlobs

_IDLE_S: Final = 60.0
"""The thread looks up this often although it is woken for everything."""
_NAMED_MAX: Final = 8


class Housekeeper:
    """Collects after `request`, one pass at a time; requests during a pass are one more pass. Thread safe.

    Args:
        on_event: called with (name, fields) from the thread.
    """

    def __init__(
        self,
        blobs: StreamBlobs,
        policy: Retention,
        *,
        grace_s: float = limits.GRACE_S,
        wall: Callable[[], float],
        on_event: OnEvent,
    ) -> None:
        self._blobs, self._policy, self._grace_s, self._wall = blobs, policy, grace_s, wall
        self._on_event = on_event
        self._changed = threading.Condition()
        self._wanted = False
        self._closed = False
        self._complained = ""
        self._thread: threading.Thread | None = None

    def request(self) -> None:
        """A pass is wanted. Returns at once."""
        with self._changed:
            if self._closed:
                return
            self._wanted = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="autoglm-housekeeping", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self, timeout_s: float) -> bool:
        """No more passes. False when the one under way did not end in time; it changes nothing that matters."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=timeout_s)
            return not self._thread.is_alive()
        return True

    def _work(self) -> None:
        collector: Collector | None = None
        while True:
            with self._changed:
                while not self._wanted and not self._closed:
                    self._changed.wait(_IDLE_S)
                if self._closed:
                    return
                self._wanted = False
            try:
                if collector is None:
                    collector = Collector(
                        aging(self._blobs),
                        self._policy,
                        grace_s=self._grace_s,
                        age_s=self._grace_s,
                        wall=self._wall,
                    )
                self._tell(collector.run())
            except Exception as error:  # noqa: BLE001 - also a bug in here must not become the job's
                reason = str(error) if isinstance(error, ElasticError) else f"{type(error).__name__}: {error}"
                self._complain(reason)

    def _tell(self, done: Collected) -> None:
        files = done.packs + done.manifests + done.leftovers
        if done.retired or files:
            fields = {
                "entries": done.retired[:_NAMED_MAX],
                "count": len(done.retired),
                "files": files,
                "nbytes": done.nbytes,
            }
            self._on_event("snapshot.removed", fields)
        self._complain(done.blocked)

    def _complain(self, reason: str) -> None:
        """Once as long as it stays the same: there is a pass after every snapshot."""
        if reason and reason != self._complained:
            self._on_event("snapshot.cleanup_failed", {"reason": reason})
        self._complained = reason


def aging(blobs: StreamBlobs) -> AgingBlobs:
    """Raises PlatformError for a storage that cannot tell how old its blobs are."""
    if not isinstance(blobs, AgingBlobs):
        raise PlatformError(
            "this storage does not tell how old its blobs are", valid="a directory or s3://, for collecting"
        )
    return blobs
