"""Keeps one lease alive, and knows in time when it cannot: self-fencing.

Two threads: one renews (and may hang in the store), the other watches the clock. The lease cannot end in the
store before `lease_s` after the last successful renewal was *sent*; the watcher gives up at `FENCE_FRACTION`
of that, so that there is time to stop the workers before anybody else may count this node as gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from autoglm_elastic.coordination import StoreRefused
from autoglm_elastic.ports import Clock, Store, StoreUnavailable

FENCE_FRACTION: Final = 0.75
RENEW_FRACTION: Final = 0.2
"""Renewals start this part of the lease apart: two may fail before the fence."""

RETRY_FRACTION: Final = 0.05
"""After one that failed the next follows sooner."""

STOP_S_MAX: Final = 1.0


class LeaseKeeper:
    """Begins with a lease just granted; `granted_at` is from before the request was sent. `on_lost(reason)`
    is called at most once, from one of the threads, and not after `stop` began."""

    def __init__(
        self,
        store: Store,
        lease: int,
        *,
        lease_s: float,
        granted_at: float,
        on_lost: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._store = store
        self._lease = lease
        self._lease_s = lease_s
        self._renewed_at = granted_at
        self._why = ""
        self._on_lost = on_lost
        self._clock = clock
        self._changed = threading.Condition()
        self._over = False
        self._threads = [
            threading.Thread(target=self._renew, name="autoglm-lease", daemon=True),
            threading.Thread(target=self._watch_clock, name="autoglm-fence", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends both threads; one that hangs in the store is left to the store's own time limit."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(STOP_S_MAX)

    def _renew(self) -> None:
        usual_s = pause_s = RENEW_FRACTION * self._lease_s
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._over, pause_s):
                    return
            sent_at = self._clock.monotonic()
            try:
                granted_s = self._store.lease_keep_alive(self._lease)
            except (StoreUnavailable, StoreRefused) as error:
                self._why = f": {error}"
                pause_s = RETRY_FRACTION * self._lease_s
                continue
            # A renewal that took long has used up its pause: it only counts from when it was sent.
            pause_s = max(0.0, sent_at + usual_s - self._clock.monotonic())
            if granted_s <= 0:
                self._lose("the lease has ended in the store: the others count this node as gone")
                return
            with self._changed:
                self._renewed_at, self._why = sent_at, ""
                self._changed.notify_all()

    def _watch_clock(self) -> None:
        with self._changed:
            while not self._over:
                remaining_s = self._renewed_at + FENCE_FRACTION * self._lease_s - self._clock.monotonic()
                if remaining_s <= 0:
                    break
                self._changed.wait(remaining_s)
        self._lose(f"the lease could not be renewed for {FENCE_FRACTION * self._lease_s:g} s{self._why}")

    def _lose(self, reason: str) -> None:
        with self._changed:
            if self._over:
                return
            self._over = True
            self._changed.notify_all()
        self._on_lost(reason)
