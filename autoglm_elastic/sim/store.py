"""The coordination store of a simulation: keys, leases, watches in order; requests that get lost or answer
Unknown.

It is modelled on `ports.Store`: one revision, transactions that compare one key, keys that a lease owns. A
watcher gets every change once and in order, however late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autoglm_elastic.core.outcome import Outcome
from autoglm_elastic.sim.loop import Actor, Loop


@dataclass(frozen=True, slots=True)
class Change:
    key: str
    value: Any
    revision: int


class Client(Actor):
    """An agent as the store sees it: a lease, a watch, and whether the network between them works."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.lease_valid = True
        self.cut_until = 0.0
        self.inbox: deque[tuple[float, Change]] = deque()

    def heeds(self, key: str) -> bool:
        """Whether a change of `key` would mean anything to it now: what would not need not be simulated."""
        raise NotImplementedError

    def on_change(self, change: Change) -> None:
        raise NotImplementedError


class SimStore:
    """Values are whatever is put; None means absent."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.revision = 0
        self.keys: dict[str, tuple[Any, int, Client | None]] = {}
        self._watchers: list[Client] = []
        self.operations = self.pushes = 0
        """Requests so far, lost ones included; and changes handed to watchers."""

    def get(self, key: str) -> tuple[Any, int]:
        """(value, modification revision), (None, 0) when it is absent."""
        value, revision, _ = self.keys.get(key, (None, 0, None))
        return value, revision

    def put(
        self, key: str, value: Any, *, owner: Client | None = None, expected: int | None = None
    ) -> Outcome:
        """CONFLICT unless the key is at revision `expected` (0: absent). A lost lease can own nothing."""
        if expected is not None and self.get(key)[1] != expected:
            return Outcome.CONFLICT
        if owner is not None and not owner.lease_valid:
            return Outcome.CONFLICT
        self.revision += 1
        self.keys[key] = (value, self.revision, owner)
        self._notify(Change(key, value, self.revision))
        return Outcome.OK

    def watch(self, client: Client) -> None:
        self._watchers.append(client)

    def expire(self, client: Client) -> None:
        """The lease of `client` ends: its keys go."""
        client.lease_valid = False
        self._watchers = [watcher for watcher in self._watchers if watcher is not client]
        for key in [key for key, (_, _, owner) in self.keys.items() if owner is client]:
            self.revision += 1
            del self.keys[key]
            self._notify(Change(key, None, self.revision))

    def request(self, client: Client, apply: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Send a request; `then` gets its result, or Outcome.UNKNOWN: it may have been applied, or be applied
        yet."""
        loop, config = self._loop, self._loop.config
        self.operations += 1
        lost = client.cut_until > loop.now
        unknown = lost or loop.chance(config.unknown)
        if unknown:
            if not lost and loop.chance(0.6):
                loop.soon(config.message_s * (30 if loop.chance(0.3) else 1), None, self._apply, apply)
            loop.soon(config.retry_s, client, then, Outcome.UNKNOWN)
            return
        loop.soon(config.message_s, None, self._answer, client, apply, then)

    @staticmethod
    def _apply(apply: Callable[[], Any]) -> None:
        apply()

    def _answer(self, client: Client, apply: Callable[[], Any], then: Callable[[Any], None]) -> None:
        self._loop.soon(self._loop.config.message_s, client, then, apply())

    def _notify(self, change: Change) -> None:
        self.pushes += len(self._watchers)
        if self._loop.config.steady:
            # Nobody's delay differs: one event instead of one a watcher.
            self._loop.after(
                self._loop.config.message_s, None, self._deliver_to_all, list(self._watchers), change
            )
            return
        for client in self._watchers:
            due = max(self._loop.now, client.cut_until) + self._loop.delay(self._loop.config.message_s)
            if client.inbox:
                due = max(due, client.inbox[-1][0])
            client.inbox.append((due, change))
            self._loop.after(due - self._loop.now, client, self._deliver, client)

    def _deliver_to_all(self, clients: list[Client], change: Change) -> None:
        now = self._loop.now
        for client in clients:
            if not client.alive or not client.heeds(change.key):
                continue
            asleep_s = max(client.cut_until, client.paused_until) - now
            if asleep_s <= 0 and not client.inbox:
                client.on_change(change)
                continue
            due = max(now + max(0.0, asleep_s), client.inbox[-1][0] if client.inbox else now)
            client.inbox.append((due, change))
            self._loop.after(due - now, client, self._deliver, client)

    def _deliver(self, client: Client) -> None:
        """Everything that is due, in order: a paused client that wakes up finds it all."""
        while client.alive and client.inbox and client.inbox[0][0] <= self._loop.now:
            _, change = client.inbox.popleft()
            client.on_change(change)
