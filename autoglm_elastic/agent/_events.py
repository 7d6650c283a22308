"""What a session tells its agent, and the descriptor that says that there is something to tell."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

from autoglm_elastic.agent._view import Closed
from autoglm_elastic.core.membership import Generation

EVENTS_MAX: Final = 4096
"""An agent that takes none for so long is stuck; the oldest are dropped then."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A new generation, also one that this node is not placed in. When `generation.parent` is not the
    generation last seen, one was missed: treat this one as unplanned."""

    generation: Generation


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The others may count this node as gone soon, or do already: stop the workers now."""

    reason: str


@dataclass(frozen=True, slots=True)
class StoreLost:
    """The connection to the store is gone; running steps go on. `LeaseLost` follows unless it comes back in
    time."""

    reason: str


@dataclass(frozen=True, slots=True)
class StoreBack:
    """The connection is there again."""


SessionEvent = Sealed | Closed | LeaseLost | StoreLost | StoreBack


class EventQueue:
    """`fd` is readable while there are events. Thread safe."""

    def __init__(self) -> None:
        self._events: deque[SessionEvent] = deque(maxlen=EVENTS_MAX)
        self._lock = threading.Lock()
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._open = True

    def push(self, event: SessionEvent) -> None:
        with self._lock:
            if self._open:
                self._events.append(event)
                os.eventfd_write(self.fd, 1)

    def take(self) -> list[SessionEvent]:
        with self._lock:
            taken = list(self._events)
            self._events.clear()
            if self._open:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self.fd)
            return taken

    def close(self) -> None:
        with self._lock:
            if self._open:
                self._open = False
                os.close(self.fd)
