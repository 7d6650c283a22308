"""One watch of a client: where it stands, and its deliveries, each once and none after `cancel` returned."""

from __future__ import annotations

import threading
from collections.abc import Callable

from autoglm_elastic.ports import EventKind, WatchEvent


class ClientWatch:
    """`resume_revision`: what to ask the server for after a new connection."""

    def __init__(
        self,
        prefix: str,
        from_revision: int,
        on_event: Callable[[WatchEvent], None],
        on_cancel: Callable[[], None],
    ) -> None:
        self.prefix = prefix
        self.resume_revision = from_revision
        self._on_event = on_event
        self._on_cancel = on_cancel
        self._delivering = threading.RLock()
        self._cancelled = False
        self._revision = -1
        self._keys: set[str] = set()
        """Keys delivered of `_revision`: a connection may break in the middle of a transaction."""

    @property
    def seen_revision(self) -> int:
        """Of the last change that was handed over; -1 before the first."""
        return self._revision

    def deliver(self, events: list[WatchEvent], resume_revision: int) -> None:
        for event in events:
            if event.revision < self._revision or (
                event.revision == self._revision and event.key in self._keys and not event.lost
            ):
                continue
            if event.revision > self._revision or event.lost:
                self._revision = event.revision
                self._keys.clear()
            self._keys.add(event.key)
            with self._delivering:
                if not self._cancelled:
                    self._on_event(event)
        self.resume_revision = resume_revision

    def restart(self) -> None:
        """The server is another one: nothing we know of the old one holds."""
        self._revision = -1
        self._keys.clear()
        self.resume_revision = 1
        with self._delivering:
            if not self._cancelled:
                self._on_event(WatchEvent(EventKind.DELETE, self.prefix, None, 0, lost=True))

    def cancel(self) -> None:
        with self._delivering:
            self._cancelled = True
        self._on_cancel()
