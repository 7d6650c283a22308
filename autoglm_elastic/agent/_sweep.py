"""Clears away what a run has left in a store that outlives it.

A run without a member is over: whoever leaves last, or comes first to a new attempt of the same run, deletes its keys.
Nothing is deleted under a run that is alive: every batch compares that nobody leads and that no generation was
sealed since the keys were read. (Keys that nobody comes to delete end with the store's own lease for the run.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from autoglm_elastic.agent._keys import Keys
from autoglm_elastic.ports import Compare, Delete, Entry, Outcome, Store

BATCH_MAX: Final = 64
"""Keys deleted at once: etcd takes 128 operations in a transaction unless it is told otherwise."""


def sweep(store: Store, keys: Keys) -> bool:
    """Delete every key of the run unless it has a member. Whether they were all deleted.

    Raises:
        StoreUnavailable, StoreRefused.
    """
    entries, _ = store.get_prefix(keys.prefix)
    found = {entry.key: entry for entry in entries}
    if any(keys.parse(key)[0] in ("members", "leader") for key in found):
        return False
    last = [found.pop(key) for key in (keys.generation, keys.closed) if key in found]
    guards = (
        Compare(keys.leader, 0),
        *(Compare(key, _revision(last, key)) for key in (keys.generation, keys.closed)),
    )
    rest = list(found)
    batches = [rest[start : start + BATCH_MAX] for start in range(0, len(rest), BATCH_MAX)]
    for batch in [*batches, [entry.key for entry in last]]:
        if batch and store.txn(guards, [Delete(key) for key in batch]).outcome is not Outcome.OK:
            return False
    return True


def _revision(entries: Sequence[Entry], key: str) -> int:
    return next((entry.mod_revision for entry in entries if entry.key == key), 0)
