"""What a new generation agrees on when the store of its snapshots cannot be read."""

from __future__ import annotations

import pytest

from autoglm_elastic.core.lineage import EntryFact, GenerationRecord
from autoglm_elastic.core.recovery import Holding
from autoglm_elastic.errors import PlatformError
from autoglm_elastic.ports import Outcome
from autoglm_elastic.training.agreement import Held, Stored, decide


class Unreadable(Stored):
    """Neither gives nor takes anything."""

    def __init__(self) -> None:
        self.owed: list[int] = []

    def entries(self) -> list[EntryFact]:
        raise PlatformError("listing s3://bucket/run: no answer")

    def put_generation(self, record: GenerationRecord, *, patient: bool) -> Outcome:
        raise PlatformError("creating s3://bucket/run: no answer")

    def owing(self, record: GenerationRecord, reason: str) -> None:
        self.owed.append(record.number)


def held(
    rank: int,
    generation: int,
    step: int,
    *,
    complete: bool = True,
    shard: str = "",
    unwritten: tuple[int, ...] = (),
    followed: int | None = None,
) -> Held:
    """`followed`: the plan of which generation; by default that in which the step was committed."""
    holding = Holding(
        rank=rank,
        node=f"n{rank}",
        generation=generation,
        step=step,
        complete=complete,
        sharded=bool(shard),
        shard=shard or "0/1",
    )
    records = tuple(GenerationRecord(number, number - 1, 5, None, "live").to_json() for number in unwritten)
    shards = int(shard.partition("/")[2]) if shard else 0
    followed = generation if followed is None else followed
    return Held(holding, {"seed": 1, "cursors": {}}, 1, ("model",), shards, records, followed)


def test_survivors_of_the_generation_before_go_on_and_owe_the_record() -> None:
    stored = Unreadable()
    agreement = decide(2, 4, [held(0, 3, 9), held(1, -1, -1, complete=False)], stored)
    assert (agreement.plan.tier, agreement.plan.step, agreement.plan.source_rank) == ("live", 9, 0)
    assert [record["number"] for record in agreement.unwritten] == stored.owed == [4]


def test_records_that_were_owed_before_are_still() -> None:
    agreement = decide(2, 4, [held(0, 3, 9, unwritten=(3,)), held(1, -1, -1, complete=False)], Unreadable())
    assert [record["number"] for record in agreement.unwritten] == [3, 4]
    assert agreement.plan.step == 9


def test_a_generation_that_took_no_step_is_enough_when_its_plan_was_followed() -> None:
    """A death during a recovery: the state is of an older generation, whose end the plan has settled."""
    both = [held(0, 2, 9, followed=3), held(1, 2, 10, followed=2)]
    plan = decide(2, 4, both, Unreadable()).plan
    assert (plan.tier, plan.step, plan.source_rank, plan.receivers) == ("live", 9, 0, (1,))


def test_a_state_of_an_older_generation_is_not_trusted_unread() -> None:
    """The generation between may have gone further, and have committed it."""
    with pytest.raises(PlatformError, match="listing"):
        decide(1, 4, [held(0, 2, 9)], Unreadable())


def test_an_older_state_beside_a_newer_is_not_taken() -> None:
    agreement = decide(2, 4, [held(0, 2, 90), held(1, 3, 9)], Unreadable())
    assert (agreement.plan.step, agreement.plan.source_rank) == (9, 1)


def test_without_all_shards_the_store_is_needed() -> None:
    both = [held(0, 3, 9, shard="0/2"), held(1, 3, 9, shard="1/2")]
    assert decide(2, 4, both, Unreadable()).plan.tier == "live"
    with pytest.raises(PlatformError, match="listing"):
        decide(1, 4, both[:1], Unreadable())


def test_a_first_start_needs_the_store() -> None:
    with pytest.raises(PlatformError, match="listing"):
        decide(1, 1, [held(0, -1, -1, complete=False)], Unreadable())
