"""What a job that was handed to a keeper comes to, and how a keeper can fail whoever waits for it."""

from __future__ import annotations

import threading

from autoglm_elastic.catalog.format import Pack
from autoglm_elastic.errors import ElasticError, PlatformError


class KeeperGone(PlatformError):
    """No keeper can be had, or it has died: what it had not made durable for us is lost."""


class Unanswered(PlatformError):
    """A keeper that may only be slow."""


class Pending:
    """A job on its way. Any thread may wait for it."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._packs: tuple[Pack, ...] = ()
        self._error: ElasticError | None = None
        self.since: float | None = None
        """As in fmt.Prepared, once the packs are durable."""

    def done(self) -> bool:
        return self._done.is_set()

    def wait(self, timeout_s: float) -> tuple[Pack, ...]:
        """The packs, durable under their names. Raises ElasticError: why they are not, or not yet."""
        if not self._done.wait(timeout_s):
            raise PlatformError(f"the packs were not durable within {timeout_s} s")
        if self._error is not None:
            raise self._error
        return self._packs

    def settle(
        self, packs: tuple[Pack, ...], error: ElasticError | None = None, since: float | None = None
    ) -> None:
        self._packs, self._error, self.since = packs, error, since
        self._done.set()
