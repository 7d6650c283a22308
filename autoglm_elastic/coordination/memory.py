"""A store inside one process: for worlds of one node, for tests, and as the reading of what the port
means."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from autoglm_elastic.coordination._state import StoreState
from autoglm_elastic.coordination.clock import SystemClock
from autoglm_elastic.ports import Clock, Compare, Delete, Entry, Json, Put, StoreUnavailable, Txn, WatchEvent

CLOSE_S_MAX = 5.0
"""How long `close` waits for the store's thread: a callback under way is let end."""


class MemoryStore:
    """`ports.Store` over `StoreState`, one lock, and one thread that ends leases and calls the watchers."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._state = StoreState()
        self._changed = threading.Condition()
        self._watches: list[_MemoryWatch] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="autoglm-memory-store", daemon=True)
        self._thread.start()

    def get(self, key: str) -> Entry | None:
        with self._changed:
            self._settle()
            return self._state.get(key)

    def get_prefix(self, prefix: str) -> tuple[list[Entry], int]:
        with self._changed:
            self._settle()
            return self._state.get_prefix(prefix), self._state.revision

    def put(self, key: str, value: Json, *, lease: int = 0) -> int:
        with self._changed:
            self._settle()
            return self._state.put(key, value, lease)

    def delete(self, key: str) -> bool:
        with self._changed:
            self._settle()
            return self._state.delete(key)

    def txn(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Txn:
        with self._changed:
            self._settle()
            return self._state.txn(compares, operations)

    def lease_grant(self, ttl_s: float) -> int:
        with self._changed:
            self._settle()
            return self._state.lease_grant(ttl_s, self._clock.monotonic())

    def lease_keep_alive(self, lease: int) -> float:
        with self._changed:
            self._settle()
            return self._state.lease_keep_alive(lease, self._clock.monotonic())

    def lease_revoke(self, lease: int) -> None:
        with self._changed:
            self._settle()
            self._state.lease_revoke(lease)

    def watch(self, prefix: str, from_revision: int, on_event: Callable[[WatchEvent], None]) -> _MemoryWatch:
        with self._changed:
            self._settle()
            watch = _MemoryWatch(self, prefix, from_revision, on_event)
            self._watches.append(watch)
            return watch

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S_MAX)

    def _settle(self) -> None:
        """Before every call: leases whose time is up have ended, and the thread looks for what the call
        changes."""
        if self._closed:
            raise StoreUnavailable("the store is closed", sent=False)
        self._state.expire(self._clock.monotonic())
        self._changed.notify()

    def _forget(self, watch: _MemoryWatch) -> None:
        with self._changed:
            if watch in self._watches:
                self._watches.remove(watch)

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            # Also when a callback raised: a store whose watches are dead must not look alive.
            self._closed = True

    def _serve(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                self._state.expire(self._clock.monotonic())
                batches = []
                for watch in self._watches:
                    events, watch.next_revision = self._state.changes_since(watch.prefix, watch.next_revision)
                    if events:
                        batches.append((watch, events))
                if not batches:
                    deadline = self._state.next_deadline()
                    self._changed.wait(
                        None if deadline is None else max(0.0, deadline - self._clock.monotonic())
                    )
                    continue
            for watch, events in batches:
                watch.deliver(events)


class _MemoryWatch:
    def __init__(
        self, store: MemoryStore, prefix: str, from_revision: int, on_event: Callable[[WatchEvent], None]
    ) -> None:
        self.prefix = prefix
        self.next_revision = from_revision
        self._store = store
        self._on_event = on_event
        self._delivering = threading.RLock()
        self._cancelled = False

    def deliver(self, events: list[WatchEvent]) -> None:
        for event in events:
            with self._delivering:
                if not self._cancelled:
                    self._on_event(event)

    def cancel(self) -> None:
        with self._delivering:
            self._cancelled = True
        self._store._forget(self)
