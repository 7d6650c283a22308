"""What the leader knows, and what its rules ask of that. The rules are in `membership` and `_rounds`."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from autoglm_elastic.core.budget import Budget
from autoglm_elastic.core.generation import Generation, Member, Placement
from autoglm_elastic.core.news import Policy


class Phase(enum.Enum):
    """FORMING: no generation yet. RUNNING: the current generation is whole. BROKEN: it is not, and there are
    too few nodes for the next. ENDED: failed or finished."""

    FORMING = "forming"
    RUNNING = "running"
    BROKEN = "broken"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class LeaderState:
    """`members`: live nodes in order of arrival. `fresh`: those of them whose workers are not those of the
    current generation. `finished`: nodes that are done and are not placed again. `unseen`: nodes of an
    adopted generation that have not shown up yet, lost at `unseen_until`. `unheard`: nodes that have entered no
    generation since the newest failure, which may have been theirs. `waiting_since`: since when there
    have been too few nodes, or, while forming, since the last one joined. `inherited`: the current generation
    was sealed by somebody else, and this leader's node has no part in it. `reason`: why the next generation is
    needed."""

    policy: Policy
    next_number: int
    phase: Phase
    budget: Budget
    waiting_since: float
    started_at: float
    generation: Generation | None = None
    sealed_at: float = 0.0
    members: tuple[Member, ...] = ()
    fresh: frozenset[str] = frozenset()
    finished: frozenset[str] = frozenset()
    unseen: frozenset[str] = frozenset()
    unseen_until: float = 0.0
    unheard: frozenset[str] = frozenset()
    inherited: bool = False
    restart_count: int = 0
    reason: str = ""

    def member(self, node: str) -> Member | None:
        return next((member for member in self.members if member.node == node), None)

    def placed(self, node: str) -> Placement | None:
        return None if self.generation is None else self.generation.placement(node)

    def works(self, node: str) -> bool:
        """Whether the current generation counts on this node."""
        return self.placed(node) is not None and node not in self.fresh and node not in self.finished

    def working(self) -> frozenset[str]:
        """The nodes that the current generation counts on and that are not known to be gone."""
        there = {member.node for member in self.members} | self.unseen
        return frozenset(node for node in there if self.works(node))

    def counts(self, node: str, number: int) -> bool:
        """Whether news of `node` from generation `number` still counts: it is the current one, or that only
        grew from it."""
        return self.generation is not None and self.generation.counts(node, number)

    def eligible(self) -> list[Member]:
        """Who would be in the next generation: survivors in their order, then newcomers as they came, up to
        the maximum."""
        live = [member for member in self.members if member.node not in self.finished]
        placed = [(self.placed(member.node), member) for member in live if member.node not in self.fresh]
        survivors = [(place.group_rank, member) for place, member in placed if place is not None]
        survivors.sort(key=lambda pair: pair[0])
        newcomers = [member for member in live if member.node in self.fresh]
        return ([member for _, member in survivors] + newcomers)[: self.policy.nodes_max]

    def all_finished(self) -> bool:
        """Whether all nodes of the current generation are done, or all of one that it only grew from.

        A node may say so after its lease was lost: its workers had finished all the same.
        """
        if self.generation is None:
            return False
        sizes = [*(count for _, count in self.generation.grown_from), len(self.generation.placements)]
        if len(self.finished) < min(sizes):
            return False
        nodes = [place.node for place in self.generation.placements]
        return any(self.finished.issuperset(nodes[:size]) for size in sizes)


def start(policy: Policy, *, first_generation: int, now: float) -> LeaderState:
    """A leader that knows nobody yet; its first generation will be `first_generation` (newer than any
    recorded)."""
    return LeaderState(
        policy=policy,
        next_number=first_generation,
        phase=Phase.FORMING,
        budget=Budget(policy.max_restarts, policy.progress_s, policy.max_failures),
        waiting_since=now,
        started_at=now,
    )
