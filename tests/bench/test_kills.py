"""What counts as back: the pure part of the benchmark, on the lines that a training would report."""

from __future__ import annotations

from autoglm_elastic.bench.kills import Recovery
from autoglm_elastic.bench.steplog import Line


def _lines(text: str) -> list[Line]:
    """One line each: ms rank step life."""
    rows = (map(int, line.split()) for line in text.strip().splitlines())
    return [Line(ms * 1_000_000, "step", rank, step, life, 100 + rank) for ms, rank, step, life in rows]


def _after_kill(text: str) -> Recovery:
    """Killed at 1000 ms in life 0, at step 17 of a job of two."""
    recovery = Recovery(killed_ns=1_000_000_000, life=0, reached=17, workers=2)
    for line in _lines(text):
        recovery.feed(line)
    return recovery


def test_steps_from_the_saved_file_are_redone_until_one_is_new() -> None:
    steps = "".join(f"{4000 + 10 * step} {rank} {step} 1\n" for step in range(11, 19) for rank in (0, 1))
    recovery = _after_kill(steps)
    assert recovery.redone == 7
    assert recovery.full_world_ns == 4_110_000_000
    assert recovery.new_step_ns == recovery.back_ns == 4_180_000_000


def test_what_a_survivor_finishes_of_the_old_life_is_not_new_and_not_lost() -> None:
    recovery = _after_kill("1002 0 18 0\n 1040 0 19 1\n 1041 1 19 1")
    assert recovery.reached == 18
    assert recovery.redone == 0
    assert recovery.new_step_ns == 1_040_000_000
    assert recovery.back_ns == 1_041_000_000


def test_a_smaller_world_makes_new_steps_before_the_full_one_is_back() -> None:
    recovery = _after_kill("1040 0 18 1\n 1080 0 19 1\n 1200 0 20 2\n 1201 1 20 2")
    assert recovery.new_step_ns == 1_040_000_000
    assert recovery.full_world_ns == recovery.back_ns == 1_201_000_000
    assert recovery.last_life - recovery.life == 2


def test_not_back_while_a_rank_is_missing() -> None:
    recovery = _after_kill("1040 0 18 1\n 1080 1 18 2")
    assert recovery.new_step_ns is not None
    assert recovery.back_ns is None


def test_ranks_are_read_in_any_order() -> None:
    recovery = _after_kill("1042 1 18 1\n 1040 0 18 1\n 1052 1 19 1\n 1050 0 19 1")
    assert recovery.full_world_ns == recovery.back_ns == 1_042_000_000
    assert recovery.new_step_ns == 1_040_000_000
