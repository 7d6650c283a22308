"""What to resume from: a pure function of who is alive, what each holds, and the catalog.

Replicated state: any complete replica holds the whole, and survivors may stand one step apart (an all-reduce
can finish on some ranks only), so the most advanced one is the source and no step is lost. Sharded state: the
live shards, if every expected shard is there at one and the same step of one generation. Otherwise the newest
snapshot of the lineage. Shards or replicas of different steps or generations are never mixed, and every
choice is explained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from autoglm_elastic.core import lineage
from autoglm_elastic.core.lineage import EntryFact, GenerationRecord

Tier = Literal["live", "disk", "fresh"]

CANDIDATES_MAX: Final = 16
"""A plan carries so many snapshots to try; when none of them verifies, plan again without them."""

REJECTED_MAX: Final = 16
"""A plan explains so many rejections."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank of the new world holds in memory.

    `generation` is the one in which `step` was committed; `step` is -1 for nothing. `complete` is False for a
    state that was being changed when its holder was interrupted. `shard` names the part it holds if the state
    is `sharded`.
    """

    rank: int
    node: str
    generation: int
    step: int
    complete: bool
    sharded: bool = False
    shard: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Resume at `step` of `generation` (-1 and -1: from nothing).

    live: `source_rank` sends (to `receivers`) what they lack; for sharded state every rank not among the
    receivers is a source of its own shard. disk: load the first of `entries` that verifies; when none does,
    plan again without them.
    """

    tier: Tier
    step: int
    generation: int
    source_rank: int | None
    receivers: tuple[int, ...]
    entries: tuple[str, ...]
    reason: str
    rejected: tuple[str, ...] = ()

    def record(self, number: int, entry: str | None = None) -> GenerationRecord:
        """The lineage record of generation `number` that follows this plan; `entry`: the snapshot that did
        verify.

        Write it (put if absent) before any state is adopted and any step is taken. Raises ValueError for an
        entry that is not in the plan.
        """
        if self.tier != "disk":
            return GenerationRecord(number, self.generation, self.step, None, self.tier)
        if entry not in self.entries:
            raise ValueError(f"snapshot {entry!r} is not in the plan ({', '.join(self.entries)})")
        fact = lineage.parse_entry_name(entry)
        return GenerationRecord(number, fact.generation, fact.step, entry, self.tier)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "receivers": list(self.receivers),
            "entries": list(self.entries),
            "rejected": list(self.rejected),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not write."""
        tier: Tier
        match data["tier"]:
            case "live":
                tier = "live"
            case "disk":
                tier = "disk"
            case "fresh":
                tier = "fresh"
            case other:
                raise ValueError(f"unknown tier {other!r}")
        source = data["source_rank"]
        return cls(
            tier=tier,
            step=int(data["step"]),
            generation=int(data["generation"]),
            source_rank=None if source is None else int(source),
            receivers=tuple(int(rank) for rank in data["receivers"]),
            entries=tuple(str(name) for name in data["entries"]),
            reason=str(data["reason"]),
            rejected=tuple(str(text) for text in data["rejected"]),
        )


@dataclass(frozen=True, slots=True)
class _Live:
    step: int
    generation: int
    holders: tuple[int, ...]


def plan(
    world_size: int,
    holdings: Iterable[Holding],
    entries: Iterable[EntryFact],
    records: Iterable[GenerationRecord],
    *,
    sharded_expected: frozenset[str] = frozenset(),
    live_shards: bool,
) -> Plan:
    """Decide where a world of `world_size` ranks resumes.

    `sharded_expected` names the shards that make up the whole (of the world that made them); `live_shards`
    says whether they can be moved between live ranks at all. Without any record (a job without a run
    directory) the newest generation that is held counts. Raises ValueError for ranks outside the world or
    given twice.
    """
    holdings, records = tuple(holdings), tuple(records)
    _check_ranks(world_size, holdings)
    rejected: list[str] = []
    usable = _usable(holdings, records, rejected)
    sharded = bool(sharded_expected) or any(holding.sharded for holding in usable)
    live = (
        _live_shards(usable, sharded_expected, live_shards, rejected) if sharded else _live_replicas(usable)
    )
    stored = lineage.candidates(entries, records)
    newer = [entry for entry in stored if live is None or entry.step > live.step]
    if newer:
        why = _disk_reason(newer[0], live, rejected)
        names = tuple(entry.name for entry in newer[:CANDIDATES_MAX])
        everyone = tuple(range(world_size))
        first = newer[0]
        return Plan("disk", first.step, first.generation, None, everyone, names, why, _bounded(rejected))
    if live is not None:
        others = tuple(rank for rank in range(world_size) if rank not in live.holders)
        held = "all its shards are" if sharded else f"rank {live.holders[0]} is"
        why = f"live step {live.step}: {held} complete in memory"
        source = live.holders[0]
        return Plan("live", live.step, live.generation, source, others, (), why, _bounded(rejected))
    why = "fresh: nothing is held in memory and there is no snapshot in the lineage"
    return Plan("fresh", -1, -1, None, tuple(range(world_size)), (), why, _bounded(rejected))


def _check_ranks(world_size: int, holdings: Sequence[Holding]) -> None:
    seen: set[int] = set()
    for holding in holdings:
        if not 0 <= holding.rank < world_size or holding.rank in seen:
            raise ValueError(f"holding of rank {holding.rank} in a world of {world_size}, or given twice")
        seen.add(holding.rank)


def _usable(
    holdings: Sequence[Holding], records: Sequence[GenerationRecord], rejected: list[str]
) -> list[Holding]:
    """The holdings that may be resumed from: complete, and of the lineage."""
    line = lineage.spans(records)
    held = [holding for holding in holdings if holding.step >= 0]
    newest_held = max((holding.generation for holding in held if holding.complete), default=-1)
    usable = []
    for holding in sorted(held, key=lambda holding: holding.rank):
        where = f"rank {holding.rank} on node {holding.node} at step {holding.step}"
        if not holding.complete:
            rejected.append(f"{where}: interrupted while its state was changing")
        elif not records and holding.generation != newest_held:
            rejected.append(f"{where}: of generation {holding.generation}, not {newest_held}")
        elif records and not lineage.within(EntryFact("", holding.step, holding.generation), line):
            left = line.get(holding.generation, (-1, None))[1]
            then = "is not in the lineage" if left is None else f"was left at step {left}"
            rejected.append(f"{where}: generation {holding.generation} {then}")
        else:
            usable.append(holding)
    return usable


def _live_replicas(usable: Sequence[Holding]) -> _Live | None:
    if not usable:
        return None
    best = max(usable, key=lambda holding: (holding.step, holding.generation))
    return _Live(best.step, best.generation, _same_point(usable, best.step, best.generation))


def _live_shards(
    usable: Sequence[Holding], expected: frozenset[str], allowed: bool, rejected: list[str]
) -> _Live | None:
    for step, generation in sorted({(holding.step, holding.generation) for holding in usable}, reverse=True):
        holders = _same_point(usable, step, generation)
        held = {holding.shard for holding in usable if holding.rank in holders and holding.sharded}
        missing = sorted(expected - held)
        if not expected:
            rejected.append(f"live step {step}: it is not known which shards make up the whole")
        elif missing:
            rejected.append(f"live step {step}: no live rank holds shard {', '.join(missing)} at it")
        elif not allowed:
            rejected.append(f"live step {step}: live shards cannot be moved here")
        else:
            return _Live(step, generation, holders)
    return None


def _same_point(usable: Sequence[Holding], step: int, generation: int) -> tuple[int, ...]:
    return tuple(
        holding.rank for holding in usable if (holding.step, holding.generation) == (step, generation)
    )


def _disk_reason(first: EntryFact, live: _Live | None, rejected: Sequence[str]) -> str:
    if live is not None:
        return f"disk step {first.step}: newer than the newest live state, step {live.step}"
    if rejected:
        return f"disk step {first.step}: {rejected[0]}"
    return f"disk step {first.step}: no rank holds a state in memory"


def _bounded(rejected: Sequence[str]) -> tuple[str, ...]:
    if len(rejected) <= REJECTED_MAX:
        return tuple(rejected)
    return (*rejected[: REJECTED_MAX - 1], f"and {len(rejected) - REJECTED_MAX + 1} more")
