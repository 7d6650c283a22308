"""Where to resume: the plans that matter, and what no plan may ever do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_elastic.core.lineage import EntryFact, GenerationRecord, entry_name, in_lineage
from autoglm_elastic.core.recovery import CANDIDATES_MAX, REJECTED_MAX, Holding, Plan, plan

RECORDS = [GenerationRecord(1, -1, -1, None, "fresh"), GenerationRecord(2, 1, 10, None, "live")]


def entry(step: int, generation: int) -> EntryFact:
    return EntryFact(entry_name(step, generation), step, generation)


def replica(rank: int, step: int, generation: int = 2, complete: bool = True) -> Holding:
    return Holding(rank, f"n{rank}", generation, step, complete)


def shard(rank: int, step: int, name: str, generation: int = 2) -> Holding:
    return Holding(rank, f"n{rank}", generation, step, True, True, name)


def test_the_most_advanced_complete_replica_is_the_source() -> None:
    chosen = plan(4, [replica(0, 12), replica(1, 13), replica(3, 13)], [], RECORDS, live_shards=False)
    assert (chosen.tier, chosen.step, chosen.generation, chosen.source_rank) == ("live", 13, 2, 1)
    assert chosen.receivers == (0, 2)
    assert chosen.reason == "live step 13: rank 1 is complete in memory"


def test_a_replica_interrupted_in_a_change_is_no_source() -> None:
    chosen = plan(2, [replica(0, 12), replica(1, 13, complete=False)], [], RECORDS, live_shards=False)
    assert (chosen.step, chosen.source_rank) == (12, 0)
    assert chosen.rejected == ("rank 1 on node n1 at step 13: interrupted while its state was changing",)


def test_a_replica_of_an_abandoned_line_is_no_source() -> None:
    """Rank 1 was away with step 12 of generation 1, which was left at step 10."""
    chosen = plan(2, [replica(0, 11), replica(1, 12, generation=1)], [], RECORDS, live_shards=False)
    assert (chosen.step, chosen.generation, chosen.source_rank) == (11, 2, 0)
    assert chosen.rejected == ("rank 1 on node n1 at step 12: generation 1 was left at step 10",)


def test_a_newer_snapshot_wins_over_live() -> None:
    chosen = plan(
        2, [replica(0, 9, 1)], [entry(5, 1), entry(12, 2), entry(11, 2)], RECORDS, live_shards=False
    )
    assert (chosen.tier, chosen.step, chosen.generation) == ("disk", 12, 2)
    assert chosen.entries == (entry_name(12, 2), entry_name(11, 2)), "older ones lose to the live state"
    assert chosen.receivers == (0, 1)
    assert chosen.source_rank is None


def test_an_equally_new_live_state_wins_over_disk() -> None:
    assert plan(1, [replica(0, 12)], [entry(12, 2)], RECORDS, live_shards=False).tier == "live"


def test_nothing_anywhere_is_a_fresh_start() -> None:
    chosen = plan(2, [replica(0, -1)], [], [], live_shards=False)
    assert (chosen.tier, chosen.step, chosen.generation) == ("fresh", -1, -1)
    assert chosen.record(5) == GenerationRecord(5, -1, -1, None, "fresh")


def test_without_records_the_newest_generation_that_is_held_counts() -> None:
    chosen = plan(2, [replica(0, 20, generation=1), replica(1, 15, generation=2)], [], [], live_shards=False)
    assert (chosen.step, chosen.generation) == (15, 2)


def test_live_shards_need_all_of_them_at_one_step() -> None:
    expected = frozenset({"0/2", "1/2"})
    whole = [shard(0, 12, "0/2"), shard(1, 12, "1/2")]
    chosen = plan(3, whole, [entry(8, 1)], RECORDS, sharded_expected=expected, live_shards=True)
    assert (chosen.tier, chosen.step, chosen.receivers) == ("live", 12, (2,))

    torn = [shard(0, 12, "0/2"), shard(1, 13, "1/2")]
    chosen = plan(2, torn, [entry(8, 1)], RECORDS, sharded_expected=expected, live_shards=True)
    assert (chosen.tier, chosen.step) == ("disk", 8)
    assert chosen.rejected == (
        "live step 13: no live rank holds shard 0/2 at it",
        "live step 12: no live rank holds shard 1/2 at it",
    )
    assert chosen.reason == f"disk step 8: {chosen.rejected[0]}"


def test_live_shards_can_be_forbidden() -> None:
    whole = [shard(0, 12, "0/1")]
    chosen = plan(1, whole, [], RECORDS, sharded_expected=frozenset({"0/1"}), live_shards=False)
    assert chosen.tier == "fresh"
    assert chosen.rejected == ("live step 12: live shards cannot be moved here",)


def test_shards_without_a_known_whole_are_not_used() -> None:
    assert plan(1, [shard(0, 12, "0/1")], [], RECORDS, live_shards=True).tier == "fresh"


def test_the_record_of_a_disk_plan_names_what_did_verify() -> None:
    chosen = plan(1, [], [entry(8, 1), entry(12, 2)], RECORDS, live_shards=False)
    assert chosen.record(3, entry_name(8, 1)) == GenerationRecord(3, 1, 8, entry_name(8, 1), "disk")
    with pytest.raises(ValueError, match="not in the plan"):
        chosen.record(3)


def test_ranks_must_be_of_the_world_and_unique() -> None:
    for holdings in ([replica(2, 1)], [replica(0, 1), replica(0, 2)]):
        with pytest.raises(ValueError, match="holding of rank"):
            plan(2, holdings, [], RECORDS, live_shards=False)


def test_explanations_and_candidates_are_bounded() -> None:
    away = [replica(rank, 12, generation=1) for rank in range(50)]
    many = [entry(step, 2) for step in range(20, 60)]
    chosen = plan(50, away, many, RECORDS, live_shards=False)
    assert len(chosen.rejected) == REJECTED_MAX
    assert chosen.rejected[-1] == "and 35 more"
    assert len(chosen.entries) == CANDIDATES_MAX


holdings_strategy = st.lists(
    st.builds(
        Holding,
        rank=st.just(0),
        node=st.just("n"),
        generation=st.integers(1, 3),
        step=st.integers(-1, 14),
        complete=st.booleans(),
        sharded=st.booleans(),
        shard=st.sampled_from(["0/2", "1/2"]),
    ),
    max_size=5,
).map(
    lambda drawn: [
        Holding(rank, f"n{rank}", h.generation, h.step, h.complete, h.sharded, h.shard)
        for rank, h in enumerate(drawn)
    ]
)


@given(
    holdings_strategy,
    st.lists(st.builds(entry, st.integers(0, 14), st.integers(1, 3)), max_size=6, unique=True),
    st.sampled_from([frozenset(), frozenset({"0/2", "1/2"})]),
    st.booleans(),
)
def test_no_plan_mixes_or_invents(
    holdings: list[Holding], entries: list[EntryFact], expected: frozenset[str], live_shards: bool
) -> None:
    chosen = plan(6, holdings, entries, RECORDS, sharded_expected=expected, live_shards=live_shards)
    assert Plan.from_json(chosen.to_json()) == chosen
    assert set(chosen.receivers) <= set(range(6))
    at_point = [
        h for h in holdings if (h.step, h.generation) == (chosen.step, chosen.generation) and h.complete
    ]
    mine = [fact for fact in entries if in_lineage(fact, RECORDS)]
    if chosen.tier == "live":
        assert in_lineage(EntryFact("", chosen.step, chosen.generation), RECORDS)
        assert set(range(6)) - set(chosen.receivers) == {h.rank for h in at_point}
        assert chosen.source_rank in {h.rank for h in at_point}
        assert expected <= {h.shard for h in at_point if h.sharded}
        assert all(fact.step <= chosen.step for fact in mine)
    elif chosen.tier == "disk":
        names = {fact.name for fact in mine}
        assert set(chosen.entries) <= names
        assert chosen.step == max(fact.step for fact in mine)
    else:
        assert not mine
