"""The ranks of a new generation agree on what to resume from, through the generation's store.

Every rank says what it holds; rank 0 plans (core/recovery.py), puts the lineage record, and tells everybody.
Nothing here moves tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import msgspec

from autoglm_elastic.core import recovery
from autoglm_elastic.core.lineage import EntryFact, GenerationRecord, parse_entry_name, spans, within
from autoglm_elastic.core.recovery import Holding, Plan
from autoglm_elastic.errors import CorruptSnapshot, ElasticError, FencedError, PlatformError
from autoglm_elastic.ports import Outcome
from autoglm_elastic.training.checking import Asking, follow
from autoglm_elastic.training.outcomes import MisuseError

LINES_MAX: Final = 8
"""Metrics told to all ranks: more can only be of worlds that were left."""

_YES: Final = b"1"
_NO: Final = b"0"


@dataclass(frozen=True, slots=True)
class Interval:
    """`since_s`: the newest snapshot was begun so many seconds ago, or training. `interrupted`: the end of its
    generation ended it, so another is due."""

    since_s: float = 0.0
    interrupted: bool = False


NEW_INTERVAL: Final = Interval()


@dataclass(frozen=True, slots=True)
class Held:
    """What one rank brings along. `job`: seed and cursors; `seed`: of its torch; `names`: what it tracks;
    `shards`: how many make up its sharded state; `unwritten`: lineage records that the disk did not take;
    `followed`: the generation whose plan it last followed, -1 for none; `lines`: the last metrics that it knows;
    `interval`: how far the time until the next snapshot has run."""

    holding: Holding
    job: dict[str, Any]
    seed: int
    names: tuple[str, ...] = ()
    shards: int = 0
    unwritten: tuple[dict[str, Any], ...] = ()
    followed: int = -1
    lines: tuple[dict[str, Any], ...] = ()
    interval: Interval = NEW_INTERVAL


@dataclass(frozen=True, slots=True)
class Agreement:
    """The plan and what goes with it: `job` of the step resumed from, `names` that the source tracks, and for
    a state from disk its `entry` and `layouts`. `unwritten`: lineage records that the disk did not take,
    oldest first: no snapshot is committed before they are written. `lines`: the last metrics of a live state, as its
    holders know them, oldest first. `interval`: of a live state, what went on meanwhile counts."""

    plan: Plan
    job: dict[str, Any]
    names: frozenset[str] = frozenset()
    entry: str | None = None
    holders: tuple[int, ...] = ()
    layouts: dict[str, Any] = field(default_factory=dict)
    unwritten: tuple[dict[str, Any], ...] = ()
    lines: tuple[dict[str, Any], ...] = ()
    interval: Interval = NEW_INTERVAL


class Stored:
    """What the run directory offers, as the agreement needs it. This one is of a job without a run
    directory."""

    def entries(self) -> list[EntryFact]:
        return []

    def records(self) -> list[GenerationRecord]:
        return []

    def verify(self, entry: str, part: int, parts: int) -> str:
        """What is wrong in this part of a snapshot's bytes; "" for nothing."""
        return f"no snapshot {entry}"

    def open(self, entry: str) -> Mapping[str, Any]:
        """{"job", "layouts"} of a snapshot. Raises CorruptSnapshot."""
        raise CorruptSnapshot(f"no snapshot {entry}")

    def settle(self) -> None:
        """Returns when nothing that the dead have left on this node can still become a snapshot; bounded."""

    def put_generation(self, record: GenerationRecord, *, patient: bool) -> Outcome:
        """Unless `patient`, a store that does not answer soon has not taken the record. Raises PlatformError."""
        return Outcome.OK

    def owing(self, record: GenerationRecord, reason: str) -> None:
        """A record could not be written; it has to be before a snapshot is committed."""

    def reject(self, entry: str, reason: str) -> None:
        """A candidate did not verify."""


def agree(store: Any, rank: int, world_size: int, generation: int, held: Held, stored: Stored) -> Agreement:
    """All ranks call it. Bounded by the store's timeout; raises torch.distributed.DistError past it."""
    if world_size == 1:
        if not _is_live(1, [held]):
            stored.settle()
        return decide(world_size, generation, [held], stored)
    if rank != 0:
        store.set(f"have/{rank}", msgspec.json.encode(_to_json(held)))
        if store.get("settle") == _YES:
            stored.settle()
            store.set(f"settled/{rank}", _YES)
        return _from_json(follow(store, rank, world_size, stored.verify))
    keys = [f"have/{other}" for other in range(1, world_size)]
    others = [_held(msgspec.json.decode(data)) for data in store.multi_get(keys)]
    everybody = [held, *others]
    live = _is_live(world_size, everybody)
    store.set("settle", _NO if live else _YES)
    if not live:
        stored.settle()
        store.multi_get([f"settled/{other}" for other in range(1, world_size)])
    asking = Asking(store, world_size, stored.verify)
    agreement = decide(world_size, generation, everybody, stored, asking.verify)
    asking.end(asdict(agreement) | {"plan": agreement.plan.to_json(), "names": sorted(agreement.names)})
    return agreement


def agree_on_end(store: Any, rank: int, world_size: int, step: int, last_snapshot: bool) -> bool:
    """The function returned here after `step`; waits for all ranks. Whether rank 0 wants a last snapshot.

    Raises MisuseError on rank 0 when they did not commit as many steps, torch.distributed.DistError when a
    peer is lost.
    """
    store.set(f"finished/{rank}", str(step))
    if rank == 0:
        steps = {
            int(found) for found in store.multi_get([f"finished/{other}" for other in range(world_size)])
        }
        if len(steps) > 1:
            raise MisuseError(
                f"the function returned after different steps on different ranks: {sorted(steps)}",
                valid="all ranks commit the same number of steps",
            )
    return of_rank_0(store, "finish", rank, world_size, last_snapshot)


def of_rank_0(store: Any, key: str, rank: int, world_size: int, said: bool) -> bool:
    """What rank 0 has `said`; all ranks call it, with a `key` that is new in their generation. Raises
    torch.distributed.DistError when rank 0 is lost."""
    if world_size == 1:
        return said
    if rank == 0:
        store.set(key, _YES if said else _NO)
    return bool(store.get(key) == _YES)


def _is_live(world_size: int, held: list[Held]) -> bool:
    """There is something to resume from without looking at the disk."""
    return _plan(world_size, held, [], []).tier == "live"


def decide(
    world_size: int,
    generation: int,
    held: list[Held],
    stored: Stored,
    verify: Callable[[str], str] | None = None,
) -> Agreement:
    """Rank 0's part: plan, make sure that what is planned can be read, put the record. `verify`: what is wrong with an
    entry; reads it alone by default.

    Whoever followed the plan of the generation right before this one needs nothing that is stored: no other could
    have gone on meanwhile, and a snapshot of that one is of a step that all its ranks took. So a store that is slow,
    or cannot be read at all, costs a recovery from live state nothing.
    """
    owed = _owed(held)
    entry: str | None = None
    opened: Mapping[str, Any] = {}
    here = [one for one in held if one.followed == generation - 1]
    plan = _plan(world_size, here, [], [])
    lines = _last_lines(here)
    if plan.tier != "live":
        records = _with(stored.records(), owed)
        verify = verify or (lambda entry: stored.verify(entry, 0, 1))
        plan, entry, opened = _plan_with_stored(world_size, held, records, stored, verify)
        lines = _last_lines(held, spans(records))
    record = plan.record(generation, entry)
    owed = write_records(stored, [*owed, record], required=plan.tier == "fresh")
    unwritten = tuple(record.to_json() for record in owed)
    if plan.tier == "live" and plan.source_rank is not None:
        source = held[plan.source_rank]
        holders = _holders(plan, held, source.shards) if source.holding.sharded else ()
        return Agreement(
            plan,
            source.job,
            frozenset(source.names),
            holders=holders,
            unwritten=unwritten,
            lines=lines,
            interval=_interval(held),
        )
    if plan.tier == "disk":
        job, layouts = dict(opened["job"]), dict(opened["layouts"])
        return Agreement(plan, job, entry=entry, layouts=layouts, unwritten=unwritten)
    return Agreement(plan, {"seed": held[0].seed, "cursors": {}}, unwritten=unwritten)


def _plan(
    world_size: int, held: Sequence[Held], entries: list[EntryFact], records: list[GenerationRecord]
) -> Plan:
    shards = max((one.shards for one in held if one.holding.sharded and one.holding.complete), default=0)
    return recovery.plan(
        world_size,
        [one.holding for one in held],
        entries,
        records,
        sharded_expected=frozenset(f"{shard}/{shards}" for shard in range(shards)),
        live_shards=True,
    )


def _plan_with_stored(
    world_size: int,
    held: list[Held],
    records: list[GenerationRecord],
    stored: Stored,
    verify: Callable[[str], str],
) -> tuple[Plan, str | None, Mapping[str, Any]]:
    """With everything that the run directory knows; for a state from disk the entry that did verify, opened."""
    entries = stored.entries()
    while True:
        plan = _plan(world_size, held, entries, records)
        if plan.tier != "disk":
            return plan, None, {}
        entry, opened = _first_good(plan, stored, verify)
        if entry is not None:
            return _resuming_from(entry, plan), entry, opened
        entries = [fact for fact in entries if fact.name not in plan.entries]


def as_event(plan: Plan, generation: int) -> dict[str, Any]:
    """The fields of `plan.decided`."""
    return {
        "generation": generation,
        "tier": plan.tier,
        "step": plan.step,
        "source_rank": plan.source_rank,
        "reason": plan.reason,
        "rejected": list(plan.rejected),
    }


def write_records(
    stored: Stored, records: Sequence[GenerationRecord], *, required: bool = False
) -> list[GenerationRecord]:
    """Put lineage records, oldest first, until one cannot be written; those that are left.

    Raises:
        FencedError: somebody else has the number of one of them.
        PlatformError: one could not be written and is `required`: nothing is there yet that could go on.
    """
    for done, record in enumerate(records):
        reason = "its state is not known"
        try:
            outcome = stored.put_generation(record, patient=required)
        except PlatformError as error:
            outcome, reason = Outcome.UNKNOWN, error.got
        if outcome is Outcome.CONFLICT:
            raise FencedError(f"generation {record.number} was recorded by somebody else: this one is stale")
        if outcome is Outcome.UNKNOWN and required:
            raise PlatformError(
                f"the record of generation {record.number} could not be written: {reason}",
                do="check the run directory",
            )
        if outcome is Outcome.UNKNOWN:
            stored.owing(record, reason)
            return list(records[done:])
    return []


def _owed(held: Sequence[Held]) -> list[GenerationRecord]:
    records = [GenerationRecord.from_json(data) for one in held for data in one.unwritten]
    return _with([], records)


def _with(records: Iterable[GenerationRecord], more: Iterable[GenerationRecord]) -> list[GenerationRecord]:
    """By number; what is written counts."""
    known = {record.number: record for record in [*more, *records]}
    return [known[number] for number in sorted(known)]


def _holders(plan: Plan, held: list[Held], shards: int) -> tuple[int, ...]:
    """The rank that holds shard 0, 1, … of the state that the plan resumes from."""
    holds = {h.holding.shard: h.holding.rank for h in held if h.holding.rank not in plan.receivers}
    return tuple(holds[f"{shard}/{shards}"] for shard in range(shards))


def _last_lines(
    held: Sequence[Held], line_of_descent: Mapping[int, tuple[int, int | None]] | None = None
) -> tuple[dict[str, Any], ...]:
    """Of several of one step the one that knows the loss; of a step that is not of the lineage none."""
    known: dict[tuple[int, int], dict[str, Any]] = {}
    for line in (line for one in held for line in one.lines):
        key = (line["generation"], line["step"])
        fact = EntryFact("", line["step"], line["generation"])
        if line_of_descent and not within(fact, line_of_descent):
            continue
        if key not in known or known[key]["loss"] is None:
            known[key] = line
    return tuple(known[key] for key in sorted(known)[-LINES_MAX:])


def _interval(held: Sequence[Held]) -> Interval:
    known = [one.interval for one in held]
    return Interval(max(each.since_s for each in known), any(each.interrupted for each in known))


def _resuming_from(entry: str, plan: Plan) -> Plan:
    """The plan names the newest candidate's step; the one that did verify may be an older one."""
    fact = parse_entry_name(entry)
    if (fact.step, fact.generation) == (plan.step, plan.generation):
        return plan
    passed_over = tuple(f"disk: {name} does not verify" for name in plan.entries[: plan.entries.index(entry)])
    return replace(
        plan,
        step=fact.step,
        generation=fact.generation,
        reason=f"disk step {fact.step}: the newest snapshot that verifies",
        rejected=(*plan.rejected, *passed_over),
    )


def _first_good(
    plan: Plan, stored: Stored, verify: Callable[[str], str]
) -> tuple[str | None, Mapping[str, Any]]:
    for entry in plan.entries:
        problem = verify(entry)
        try:
            if not problem:
                return entry, stored.open(entry)
        except ElasticError as error:
            problem = str(error)
        stored.reject(entry, problem)
    return None, {}


def _to_json(held: Held) -> dict[str, Any]:
    return asdict(held)


def _held(data: dict[str, Any]) -> Held:
    return Held(
        Holding(**data["holding"]),
        data["job"],
        data["seed"],
        tuple(data["names"]),
        data["shards"],
        tuple(data["unwritten"]),
        data["followed"],
        tuple(data["lines"]),
        Interval(**data["interval"]),
    )


def _from_json(data: dict[str, Any]) -> Agreement:
    names = frozenset(data["names"])
    return Agreement(
        Plan.from_json(data["plan"]),
        data["job"],
        names,
        data["entry"],
        tuple(data["holders"]),
        data["layouts"],
        tuple(data["unwritten"]),
        tuple(data["lines"]),
        Interval(**data["interval"]),
    )
