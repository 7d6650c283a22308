"""The restart budget: progress forgives, the first failure is named."""

from __future__ import annotations

from autoglm_elastic.core.budget import Budget
from autoglm_elastic.core.failure import Failure, describe_exit


def failure(step: int, name: str = "a") -> Failure:
    return Failure(name, 0, 0, 1, "", step, 0.0)


def test_failures_without_a_new_step_exhaust_it_and_the_first_is_named() -> None:
    budget = Budget(max_restarts=2, progress_s=60.0)
    allowed = []
    for name in "abc":
        budget, ok = budget.charge(5, 1.0, failure(5, name))
        allowed.append(ok)
    assert allowed == [True, True, False]
    assert budget.first is not None
    assert budget.first.node == "a"


def test_a_new_committed_step_forgives() -> None:
    budget = Budget(max_restarts=1, progress_s=60.0)
    for step in range(20):
        budget, ok = budget.charge(step, 0.1, failure(step, str(step)))
        assert ok
        assert budget.first is not None
        assert budget.first.node == str(step)


def test_redoing_old_steps_is_no_progress() -> None:
    budget, _ = Budget(max_restarts=2, progress_s=0.0).charge(100, 1.0)
    budget, ok = budget.charge(90, 1e6)
    assert ok
    _, ok = budget.charge(99, 1e6)
    assert not ok


def test_without_commits_staying_up_counts() -> None:
    budget = Budget(max_restarts=1, progress_s=60.0)
    for _ in range(10):
        budget, ok = budget.charge(-1, 61.0)
        assert ok
    _, ok = budget.charge(-1, 59.0)
    assert not ok


def test_no_restarts_allowed() -> None:
    _, ok = Budget(max_restarts=0, progress_s=1.0).charge(1000, 1000.0)
    assert not ok


def test_a_failure_reads_as_one_line() -> None:
    died = Failure("a", 1, 3, -9, "", 7, 0.0)
    assert str(died) == "rank 3 on node a died: signal 9 (SIGKILL)"
    raised = Failure("a", 1, 3, 1, "ValueError: one\n  two\n" + "x" * 1000, 7, 0.0)
    assert str(raised).startswith("rank 3 on node a died: exit code 1: ValueError: one two xxx")
    assert len(raised.message) == 500
    assert Failure.from_json(raised.to_json()) == raised
    assert describe_exit(-64) == "signal 64"


def test_a_job_that_commits_steps_has_a_budget_of_its_own() -> None:
    budget = Budget(max_restarts=0, progress_s=60.0, max_failures=2)
    _, ok = budget.charge(-1, 1.0)
    assert not ok, "nothing was ever committed: torchrun's rule"
    for _ in range(2):
        budget, ok = budget.charge(10, 1.0)
        assert ok
    _, ok = budget.charge(10, 1.0)
    assert not ok
