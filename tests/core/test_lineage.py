"""The fence: late entries of abandoned generations are not in the lineage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_elastic.core.lineage import (
    EntryFact,
    GenerationRecord,
    candidates,
    entry_name,
    in_lineage,
    newest,
    parse_entry_name,
)


def record(number: int, parent: int, step: int, entry: str | None = None) -> GenerationRecord:
    return GenerationRecord(number, parent, step, entry, "disk" if entry else "live")


def entry(step: int, generation: int) -> EntryFact:
    return EntryFact(entry_name(step, generation), step, generation)


def test_a_late_entry_of_a_left_generation_does_not_count() -> None:
    records = [record(1, -1, -1), record(2, 1, 100, entry_name(100, 1))]
    assert in_lineage(entry(100, 1), records)
    assert not in_lineage(entry(110, 1), records)
    assert in_lineage(entry(110, 2), records)
    assert newest([entry(100, 1), entry(110, 1)], records) == entry(100, 1)


def test_a_late_entry_of_a_true_ancestor_counts() -> None:
    """The job went on live from step 128, so the entry of step 120 is an ancestor, however late it is put."""
    records = [record(1, -1, -1), record(2, 1, 128)]
    assert in_lineage(entry(120, 1), records)


def test_an_abandoned_branch_does_not_count() -> None:
    records = [record(1, -1, -1), record(2, 1, 100), record(3, 1, 90, entry_name(90, 1))]
    assert not in_lineage(entry(105, 2), records)
    assert not in_lineage(entry(95, 1), records)
    assert in_lineage(entry(90, 1), records)


def test_a_grandchild_bounds_its_grandparent() -> None:
    """Generation 3 resumes below where generation 2 began: generation 1 counts up to there only."""
    records = [record(1, -1, -1), record(2, 1, 100), record(3, 2, 90)]
    assert in_lineage(entry(90, 1), records)
    assert not in_lineage(entry(95, 1), records)
    assert not in_lineage(entry(101, 2), records)


def test_a_parent_without_a_record_never_took_a_step() -> None:
    records = [record(1, -1, -1), record(4, 3, 50)]
    assert in_lineage(entry(50, 1), records)
    assert not in_lineage(entry(50, 3), records)
    assert not in_lineage(entry(60, 1), records)


def test_an_older_head_can_be_asked_about() -> None:
    records = [record(1, -1, -1), record(2, 1, 10)]
    assert in_lineage(entry(20, 1), records, head_generation=1)
    assert not in_lineage(entry(20, 2), records, head_generation=1)


def test_a_directory_without_records_shows_all_its_snapshots() -> None:
    assert candidates([entry(1, 0), entry(3, 0), entry(2, 0)], []) == [entry(3, 0), entry(2, 0), entry(1, 0)]
    assert newest([], []) is None


@given(st.integers(0, 10**15), st.integers(0, 10**6))
def test_names_round_trip(step: int, generation: int) -> None:
    fact = parse_entry_name(entry_name(step, generation))
    assert (fact.step, fact.generation) == (step, generation)
    assert parse_entry_name(fact.name + ".json") == fact


@given(st.lists(st.integers(0, 10**12 - 1), min_size=2, max_size=2))
def test_names_sort_by_step(steps: list[int]) -> None:
    assert sorted(entry_name(step, 1) for step in steps) == [entry_name(step, 1) for step in sorted(steps)]


@pytest.mark.parametrize("name", ["", "1-g1", "000000000001", "../x-g1", "-g", "000000000001-g01", "٣-g1"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a snapshot"):
        parse_entry_name(name)


def test_records_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot extend"):
        record(2, 2, 5)
    with pytest.raises(ValueError, match="parent"):
        record(2, -1, 5)
    good = record(2, 1, 5, entry_name(5, 1))
    assert GenerationRecord.from_json(good.to_json()) == good


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[GenerationRecord], set[tuple[int, int]], list[EntryFact]]:
    """Random true histories: each generation resumes at a point of the chain so far, takes steps, and leaves
    entries (late ones too). Returns the records, the points (step, generation) of the true chain, and all
    entries."""
    records: list[GenerationRecord] = []
    chain: list[tuple[int, int]] = []
    everything: list[EntryFact] = []
    for number in range(draw(st.integers(1, 6))):
        keep = draw(st.integers(0, len(chain)))
        chain = chain[:keep]
        step, parent = chain[-1] if chain else (-1, -1)
        records.append(record(number, parent, step))
        for taken in range(step + 1, step + 1 + draw(st.integers(0, 4))):
            chain.append((taken, number))
            everything.append(entry(taken, number))
    return records, set(chain), everything


@given(histories())
def test_the_lineage_is_the_true_chain(
    history: tuple[list[GenerationRecord], set[tuple[int, int]], list[EntryFact]],
) -> None:
    records, chain, everything = history
    counted = {(fact.step, fact.generation) for fact in everything if in_lineage(fact, reversed(records))}
    assert counted == chain
