"""A sealed membership: who is in, in which order, with which ranks. What the leader writes and every agent
reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from autoglm_elastic.core.failure import Failure


@dataclass(frozen=True, slots=True)
class Member:
    """A live node. `incarnation` grows whenever its agent joins anew: of the old one no worker trains."""

    node: str
    host: str
    nproc: int
    role: str
    incarnation: int

    def __post_init__(self) -> None:
        if self.nproc < 1:
            raise ValueError(f"node {self.node} offers {self.nproc} workers; at least 1")


@dataclass(frozen=True, slots=True)
class Placement:
    """A node's place: it is the `group_rank`-th node, its workers are ranks `base_rank` … `base_rank + nproc
    - 1`."""

    node: str
    host: str
    nproc: int
    role: str
    group_rank: int
    base_rank: int
    role_base_rank: int
    incarnation: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """`parent` is the generation sealed before (-1: none). `planned`: nothing broke, leave the parent at an
    agreed step boundary. `restart_count` counts the failures that led here. `failures`, `committed_step` and
    `first_failure` are the restart budget's memory, so that a new leader does not forget; so are `unheard`, the
    nodes that had entered no generation since the newest failure."""

    number: int
    parent: int
    placements: tuple[Placement, ...]
    world_size: int
    planned: bool
    reason: str
    restart_count: int
    failures: int = 0
    committed_step: int = -1
    first_failure: Failure | None = None
    grown_from: tuple[tuple[int, int], ...] = ()
    unheard: tuple[str, ...] = ()
    _by_node: Mapping[str, Placement] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_node", {place.node: place for place in self.placements})

    def nodes_of(self, number: int) -> tuple[str, ...] | None:
        """The nodes of this generation or of one it only grew from; None for any other: that one is stale."""
        for known, count in (*self.grown_from, (self.number, len(self.placements))):
            if known == number:
                return tuple(place.node for place in self.placements[:count])
        return None

    def placement(self, node: str) -> Placement | None:
        """In constant time: the leader asks it of every node after every loss."""
        return self._by_node.get(node)

    def counts(self, node: str, number: int) -> bool:
        """Whether `node` is one of `nodes_of(number)`; in constant time."""
        place = self._by_node.get(node)
        if place is None:
            return False
        sizes = (*self.grown_from, (self.number, len(self.placements)))
        return any(known == number and place.group_rank < size for known, size in sizes)

    def role_world_size(self, role: str) -> int:
        return sum(place.nproc for place in self.placements if place.role == role)

    def to_json(self) -> dict[str, Any]:
        names = (each.name for each in fields(self) if each.init)
        failure = None if self.first_failure is None else self.first_failure.to_json()
        return {name: getattr(self, name) for name in names} | {
            "placements": [asdict(place) for place in self.placements],
            "first_failure": failure,
            "grown_from": [list(pair) for pair in self.grown_from],
            "unheard": list(self.unheard),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Generation:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not write."""
        failure = data["first_failure"]
        generation = cls(
            number=int(data["number"]),
            parent=int(data["parent"]),
            placements=tuple(
                Placement(
                    node=str(place["node"]),
                    host=str(place["host"]),
                    nproc=int(place["nproc"]),
                    role=str(place["role"]),
                    group_rank=int(place["group_rank"]),
                    base_rank=int(place["base_rank"]),
                    role_base_rank=int(place["role_base_rank"]),
                    incarnation=int(place["incarnation"]),
                )
                for place in data["placements"]
            ),
            world_size=int(data["world_size"]),
            planned=bool(data["planned"]),
            reason=str(data["reason"]),
            restart_count=int(data["restart_count"]),
            failures=int(data["failures"]),
            committed_step=int(data["committed_step"]),
            first_failure=None if failure is None else Failure.from_json(failure),
            grown_from=tuple((int(number), int(count)) for number, count in data["grown_from"]),
            unheard=tuple(str(node) for node in data["unheard"]),
        )
        if generation.world_size != sum(place.nproc for place in generation.placements):
            raise ValueError(f"generation {generation.number}: world size and placements do not agree")
        return generation


def place(members: Iterable[Member]) -> tuple[Placement, ...]:
    """Give out ranks in the order of `members`."""
    placements: list[Placement] = []
    base_rank = 0
    by_role: dict[str, int] = {}
    for group_rank, member in enumerate(members):
        role_base = by_role.get(member.role, 0)
        placements.append(
            Placement(
                node=member.node,
                host=member.host,
                nproc=member.nproc,
                role=member.role,
                group_rank=group_rank,
                base_rank=base_rank,
                role_base_rank=role_base,
                incarnation=member.incarnation,
            )
        )
        base_rank += member.nproc
        by_role[member.role] = role_base + member.nproc
    return tuple(placements)
