"""The store itself as a state machine: keys, revisions, leases, history. Shared by every adapter that we
host.

No I/O, no thread, no clock: time comes in as `now` (monotonic seconds). The caller serializes the calls.
Every method that changes something either does all of it or raises and does nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from autoglm_elastic.coordination import limits
from autoglm_elastic.coordination.checks import check_lease, check_txn
from autoglm_elastic.coordination.refusals import LeaseGone, StoreRefused
from autoglm_elastic.ports import Compare, Delete, Entry, EventKind, Json, Outcome, Put, Txn, WatchEvent

_from_json = msgspec.json.Decoder()


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    deadline: float
    keys: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Stored:
    data: bytes
    create_revision: int
    mod_revision: int
    lease: int


@dataclass(frozen=True, slots=True)
class _Change:
    revision: int
    key: str
    data: bytes | None


class StoreState:
    """Values are kept as JSON bytes, so that what a caller does to an object later cannot reach the store."""

    def __init__(self) -> None:
        self.revision = 0
        self._stored: dict[str, _Stored] = {}
        self._stored_bytes = 0
        self._order: list[str] = []
        self._leases: dict[int, _Lease] = {}
        self._leases_granted = 0
        self._history: deque[_Change] = deque()
        self._history_bytes = 0
        self._forgotten_revision = 0
        """The newest revision that history no longer (wholly) holds."""

    # Reading

    def get(self, key: str) -> Entry | None:
        stored = self._stored.get(key)
        return None if stored is None else _entry(key, stored)

    def get_prefix(self, prefix: str) -> list[Entry]:
        entries = []
        for index in range(bisect_left(self._order, prefix), len(self._order)):
            key = self._order[index]
            if not key.startswith(prefix):
                break
            entries.append(_entry(key, self._stored[key]))
        return entries

    def changes_since(self, prefix: str, from_revision: int) -> tuple[list[WatchEvent], int]:
        """Events of `prefix` with revision >= `from_revision`, and the revision to ask from next time. When
        history no longer reaches back that far: one event with `lost` at the present revision."""
        if from_revision > self.revision:
            return [], from_revision
        if from_revision <= self._forgotten_revision:
            return [WatchEvent(EventKind.DELETE, prefix, None, self.revision, lost=True)], self.revision + 1
        events: list[WatchEvent] = []
        for change in reversed(self._history):
            if change.revision < from_revision:
                break
            if change.key.startswith(prefix):
                events.append(_event(change))
        events.reverse()
        return events, self.revision + 1

    # Writing

    def txn(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Txn:
        prepared = check_txn(compares, operations)
        for key, _, lease in prepared:
            if lease and lease not in self._leases:
                raise LeaseGone(f"lease {lease} of {key} has ended")
        new_keys = sum(1 for key, data, _ in prepared if data is not None and key not in self._stored)
        if len(self._stored) + new_keys > limits.KEYS_MAX:
            raise StoreRefused(f"more than {limits.KEYS_MAX} keys")
        new_bytes = sum(len(data) for _, data, _ in prepared if data is not None)
        if self._stored_bytes + new_bytes > limits.STORED_BYTES_MAX:
            raise StoreRefused(f"more than {limits.STORED_BYTES_MAX} bytes of values")
        if any(self._mod_revision(compare.key) != compare.mod_revision for compare in compares):
            found = (self.get(compare.key) for compare in compares)
            return Txn(Outcome.CONFLICT, self.revision, tuple(entry for entry in found if entry is not None))
        changes = [item for item in prepared if item[1] is not None or item[0] in self._stored]
        if changes:
            self.revision += 1
            for key, data, lease in changes:
                self._apply(key, data, lease)
            self._trim_history()
        return Txn(Outcome.OK, self.revision)

    def put(self, key: str, value: Json, lease: int) -> int:
        return self.txn((), (Put(key, value, lease),)).revision

    def delete(self, key: str) -> bool:
        existed = key in self._stored
        self.txn((), (Delete(key),))
        return existed

    # Leases

    def lease_grant(self, ttl_s: float, now: float) -> int:
        check_lease(ttl_s)
        if len(self._leases) >= limits.LEASES_MAX:
            raise StoreRefused(f"more than {limits.LEASES_MAX} leases")
        self._leases_granted += 1
        self._leases[self._leases_granted] = _Lease(ttl_s, now + ttl_s)
        return self._leases_granted

    def lease_keep_alive(self, lease: int, now: float) -> float:
        held = self._leases.get(lease)
        if held is None:
            return 0.0
        held.deadline = now + held.ttl_s
        return held.ttl_s

    def lease_shorten(self, lease: int, deadline: float) -> None:
        """It ends at `deadline` at the latest, unless it is kept alive before. Unknown leases are ignored."""
        held = self._leases.get(lease)
        if held is not None:
            held.deadline = min(held.deadline, deadline)

    def lease_revoke(self, lease: int) -> None:
        held = self._leases.pop(lease, None)
        if held is not None and held.keys:
            self.revision += 1
            for key in sorted(held.keys):
                self._apply(key, None, 0)
            self._trim_history()

    def expire(self, now: float) -> None:
        """Ends every lease whose time is up, the earliest first."""
        due = sorted((held.deadline, lease) for lease, held in self._leases.items() if held.deadline <= now)
        for _, lease in due:
            self.lease_revoke(lease)

    def next_deadline(self) -> float | None:
        return min((held.deadline for held in self._leases.values()), default=None)

    # Inside

    def _mod_revision(self, key: str) -> int:
        stored = self._stored.get(key)
        return 0 if stored is None else stored.mod_revision

    def _apply(self, key: str, data: bytes | None, lease: int) -> None:
        before = self._stored.pop(key, None)
        self._stored_bytes += len(data or b"") - (0 if before is None else len(before.data))
        if before is not None and before.lease in self._leases:
            self._leases[before.lease].keys.discard(key)
        if data is None:
            del self._order[bisect_left(self._order, key)]
        else:
            if before is None:
                insort(self._order, key)
            created = self.revision if before is None else before.create_revision
            self._stored[key] = _Stored(data, created, self.revision, lease)
            if lease:
                self._leases[lease].keys.add(key)
        self._history.append(_Change(self.revision, key, data))
        self._history_bytes += len(data or b"")

    def _trim_history(self) -> None:
        while (
            len(self._history) > limits.HISTORY_EVENTS_MAX or self._history_bytes > limits.HISTORY_BYTES_MAX
        ):
            oldest = self._history.popleft()
            self._history_bytes -= len(oldest.data or b"")
            self._forgotten_revision = oldest.revision


def _entry(key: str, stored: _Stored) -> Entry:
    return Entry(
        key, _from_json.decode(stored.data), stored.create_revision, stored.mod_revision, stored.lease
    )


def _event(change: _Change) -> WatchEvent:
    if change.data is None:
        return WatchEvent(EventKind.DELETE, change.key, None, change.revision)
    return WatchEvent(EventKind.PUT, change.key, _from_json.decode(change.data), change.revision)
