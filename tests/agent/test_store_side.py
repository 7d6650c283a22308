"""What an agent could not tell the store is told again, as often and as long as it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from autoglm_elastic.agent._store_side import RETRY_S_MAX, RETRY_S_MIN, StoreSide
from autoglm_elastic.agent.session import StoreLost
from autoglm_elastic.ports import StoreUnavailable

LOST = StoreLost("lost the connection to the store")


class Reports:
    """Each fails so many times; `told` are those that got through, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.attempts = 0

    def one(self, name: str, failures: int) -> Callable[[], None]:
        left = [failures]

        def report() -> None:
            self.attempts += 1
            left[0] -= 1
            if left[0] >= 0:
                raise StoreUnavailable("etcd did not say what became of KV.Txn", sent=True)
            self.told.append(name)

        return report


@pytest.fixture
def side() -> StoreSide:
    return StoreSide(limit_s=60.0)


def test_a_report_whose_outcome_is_open_is_told_again_although_the_store_is_not_lost(side: StoreSide) -> None:
    reports = Reports()
    side.tell(reports.one("death", 2))
    assert side.retry_at is not None
    assert side.retry_at <= time.monotonic() + RETRY_S_MIN
    side.tell_again()
    assert (reports.told, side.retry_at is None) == ([], False)
    side.tell_again()
    assert (reports.told, side.retry_at) == (["death"], None)


def test_attempts_come_less_often_and_in_order(side: StoreSide) -> None:
    reports = Reports()
    for name in ("death", "end"):
        side.tell(reports.one(name, 9))
    pauses = []
    for _ in range(9):
        assert side.retry_at is not None
        pauses.append(side.retry_at - time.monotonic())
        side.tell_again()
    assert reports.told == ["death", "end"]
    assert RETRY_S_MAX / 2 < max(pauses) <= RETRY_S_MAX


def test_a_store_that_is_lost_is_not_asked_until_it_is_back(side: StoreSide) -> None:
    reports = Reports()
    side.lost(LOST)
    side.tell(reports.one("death", 1))
    assert side.retry_at is None
    side.back()
    assert (reports.told, side.retry_at, side.deadline) == (["death"], None, None)


def test_what_is_of_a_membership_that_is_over_is_not_told(side: StoreSide) -> None:
    reports = Reports()
    side.tell(reports.one("death", 1))
    side.forget()
    side.tell_again()
    assert reports.told == []


def test_a_store_that_was_given_up_is_not_asked_again(side: StoreSide) -> None:
    side.lost(LOST)
    side.give_up()
    side.tell(Reports().one("death", 1))
    assert (side.retry_at, side.deadline) == (None, None)
