"""The recovery side of a simulated worker: rank 0 plans and records, every rank gets its state.

Reading the records and the catalog are two reads with time between them, in either order, as on a real file
system.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from autoglm_elastic.core.lineage import EntryFact, GenerationRecord
from autoglm_elastic.core.outcome import Outcome
from autoglm_elastic.core.recovery import Holding, Plan
from autoglm_elastic.sim.checker import START
from autoglm_elastic.sim.disk import State
from autoglm_elastic.sim.group import Group

if TYPE_CHECKING:
    from autoglm_elastic.sim.worker import Worker

RECORD_ATTEMPTS_MAX: Final = 8
"""A rank 0 that cannot record its generation gives up, which breaks the generation."""


class Recovery:
    """One rank's recovery into one generation."""

    def __init__(self, worker: Worker, group: Group, rank: int) -> None:
        self._worker, self._group, self._rank = worker, group, rank
        self._sim = worker.sim
        self._loop, self._disk, self._config = worker.sim.loop, worker.sim.disk, worker.sim.config
        self._records: list[GenerationRecord] | None = None
        self._entries: list[EntryFact] | None = None
        self._attempts = 0
        self._shards: dict[str, State] = {}
        self._plan: Plan | None = None

    @property
    def _current(self) -> bool:
        return self._worker.group is self._group

    def begin(self) -> None:
        """On rank 0: every rank has said what it holds; now read."""
        reads = [self._read_records, self._read_entries]
        if self._loop.chance(0.5):
            reads.reverse()
        self._loop.soon(self._config.message_s, self._worker, reads[0])
        self._loop.soon(self._config.message_s * 3, self._worker, reads[1])

    def _read_records(self) -> None:
        self._records = list(self._disk.records.values())
        self._decide()

    def _read_entries(self) -> None:
        self._entries = self._disk.facts()
        self._decide()

    def _decide(self) -> None:
        records, entries = self._records, self._entries
        if records is None or entries is None or not self._current or not self._worker.may_act():
            return
        number = self._group.number
        if any(record.number >= number for record in records):
            self._loop.trace(f"{self._worker.name}: generation {number} is fenced")
            self._sim.count("fenced")
            return
        plan, entry = self._choose(records, entries)
        for why in plan.rejected:
            self._loop.trace(f"{self._worker.name}: rejected: {why}")
        self._loop.trace(f"{self._worker.name}: generation {number} plans: {plan.reason}")
        self._sim.count(f"plan {plan.tier}")
        self._record(plan, entry, plan.record(number, entry))

    def _choose(self, records: list[GenerationRecord], entries: list[EntryFact]) -> tuple[Plan, str | None]:
        """A plan whose snapshot verifies: what does not is not there."""
        holdings = [self._group.holdings[rank] for rank in sorted(self._group.holdings)]
        while True:
            plan = self._sim.core.plan(
                self._group.world_size,
                holdings,
                entries,
                records,
                sharded_expected=_expected(holdings),
                live_shards=True,
            )
            verified = [name for name in plan.entries if not isinstance(self._disk.read(name), str)]
            if verified or plan.tier != "disk":
                return plan, verified[0] if verified else None
            entries = [fact for fact in entries if fact.name not in plan.entries]

    def _record(self, plan: Plan, entry: str | None, record: GenerationRecord) -> None:
        self._attempts += 1

        def put() -> Outcome:
            outcome = self._disk.put_record(record)
            if outcome is Outcome.OK:
                self._sim.checker.recorded(record)
            return outcome

        def then(outcome: Outcome) -> None:
            if not self._current or not self._worker.may_act():
                return
            if outcome is Outcome.OK or self._disk.records.get(record.number) == record:
                self._announce(plan, entry)
            elif self._attempts < RECORD_ATTEMPTS_MAX:
                self._record(plan, entry, record)
            else:
                self._worker.die()

        self._sim.checker.recording(record.number)
        self._disk.effect(self._worker, self._config.message_s, put, then)

    def _announce(self, plan: Plan, entry: str | None) -> None:
        for worker in self._group.members.values():
            if worker.recovery is not None:
                call = worker.recovery.on_plan
                self._loop.soon(self._config.message_s, worker, call, self._group, plan, entry)

    def on_plan(self, group: Group, plan: Plan, entry: str | None) -> None:
        if not self._current or group is not self._group:
            return
        self._plan = plan
        match plan.tier:
            case "fresh":
                self._worker.train_from(START)
            case "disk":
                self._loop.soon(self._config.write_s, self._worker, self._load, entry)
            case "live":
                self._live(plan)

    def _load(self, entry: str) -> None:
        if not self._current:
            return
        states = self._disk.read(entry)
        if isinstance(states, str):
            self._loop.broke("I5", f"the plan's snapshot is gone: {states}")
            return
        self._worker.train_from(self._worker.resharded(states[0]))

    def _live(self, plan: Plan) -> None:
        """Replicas: the source sends to the receivers. Shards: each holder sends its own to everybody."""
        state = self._worker.state
        holds = self._rank not in plan.receivers
        everybody = range(self._group.world_size)
        if holds and state is not None and (self._config.sharded or self._rank == plan.source_rank):
            for rank in everybody if self._config.sharded else plan.receivers:
                worker = self._group.members[rank]
                if worker.recovery is not None:
                    call = worker.recovery.on_state
                    self._loop.soon(self._config.message_s, worker, call, self._group, state)
        if holds and state is not None and not self._config.sharded:
            self._worker.train_from(state)
        elif self._config.sharded:
            self._assemble()

    def on_state(self, group: Group, state: State) -> None:
        if not self._current or group is not self._group or self._worker.training:
            return
        if state.shard is None:
            self._worker.train_from(state)
            return
        self._shards[f"{state.shard[0]}/{state.shard[1]}"] = state
        self._assemble()

    def _assemble(self) -> None:
        """Every shard of a whole is here: cut this rank's part out of it."""
        if self._plan is None or self._worker.training:
            return
        by_parts: dict[int, list[State]] = {}
        for state in self._shards.values():
            if state.shard is not None:
                by_parts.setdefault(state.shard[1], []).append(state)
        for parts, shards in by_parts.items():
            if len(shards) == parts:
                self._sim.checker.reduced(self._group.number, shards)
                self._worker.train_from(self._worker.resharded(shards[0]))
                return


def _expected(holdings: list[Holding]) -> frozenset[str]:
    """The shards of the newest whole: those of the world that made the newest shard."""
    held = [holding for holding in holdings if holding.shard is not None and holding.complete]
    if not held:
        return frozenset()
    newest = max(held, key=lambda holding: (holding.generation, holding.step))
    parts = int(str(newest.shard).partition("/")[2])
    return frozenset(f"{index}/{parts}" for index in range(parts))
