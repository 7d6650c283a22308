"""All ranks of a generation check a snapshot together, each a part of its bytes, before rank 0 records that the
generation extends it. They speak through the generation's store.

May touch: nothing but that store. Must never: choose the snapshot (agreement.py does).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

Verify = Callable[[str, int, int], str]
"""(entry, part, parts) → what is wrong in that part of its bytes, "" for nothing."""

_VERIFY: Final = "verify"


class Asking:
    """Rank 0: asks the others to check what it is about to choose, and tells them at last what it has chosen."""

    def __init__(self, store: Any, world_size: int, verify: Verify) -> None:
        self._store, self._world_size, self._verify = store, world_size, verify
        self._asked = 0

    def verify(self, entry: str) -> str:
        """What is wrong with `entry`, "" for nothing. Returns when everybody has read a part of it; raises
        torch.distributed.DistError when a peer is lost, or past the store's timeout."""
        number = self._asked
        self._tell({_VERIFY: entry})
        mine = self._verify(entry, 0, self._world_size)
        others = [f"verified/{number}/{rank}" for rank in range(1, self._world_size)]
        found = [msgspec.json.decode(answer, type=str) for answer in self._store.multi_get(others)]
        return next((problem for problem in (mine, *found) if problem), "")

    def end(self, told: Mapping[str, Any]) -> None:
        """`told` is what `follow` returns on the others."""
        self._tell(told)

    def _tell(self, what: Mapping[str, Any]) -> None:
        self._store.set(f"next/{self._asked}", msgspec.json.encode(what))
        self._asked += 1


def follow(store: Any, rank: int, world_size: int, verify: Verify) -> dict[str, Any]:
    """Every other rank: do what rank 0 asks for, until it says what it has chosen. Raises as `Asking.verify`."""
    number = 0
    told: dict[str, Any] = msgspec.json.decode(store.get("next/0"))
    while _VERIFY in told:
        problem = verify(told[_VERIFY], rank, world_size)
        store.set(f"verified/{number}/{rank}", msgspec.json.encode(problem))
        number += 1
        told = msgspec.json.decode(store.get(f"next/{number}"))
    return told
