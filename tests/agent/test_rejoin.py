"""When a node that lost its lease tries to come back, and when it gives up."""

from __future__ import annotations

import itertools

import pytest

from autoglm_elastic.agent._rejoin import PAUSE_S_MAX, PAUSE_S_MIN, REJOINS_MAX, Rejoin
from autoglm_elastic.errors import PlatformError

NO_STORE = ConnectionError("no store")


def test_attempts_get_rarer_until_the_limit() -> None:
    rejoin = Rejoin(10.0)
    rejoin.lost("cut off", 5, 100.0)
    times: list[float] = []
    while rejoin.due is not None and rejoin.due < 110.0:
        times.append(rejoin.due)
        rejoin.failed(NO_STORE, rejoin.due)
    with pytest.raises(PlatformError, match=r"could not rejoin for 10 s \(no store\): cut off"):
        rejoin.failed(NO_STORE, 110.0)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 100.0
    assert rejoin.due == 110.0, "the last attempt is at the limit"
    assert pauses[0] == PAUSE_S_MIN
    assert max(pauses) == PAUSE_S_MAX


def test_a_store_that_is_back_is_tried_at_once_and_a_member_tries_nothing() -> None:
    rejoin = Rejoin(10.0)
    rejoin.nudge(1.0)
    assert rejoin.due is None
    rejoin.lost("cut off", 5, 100.0)
    rejoin.failed(NO_STORE, 105.0)
    rejoin.nudge(105.1)
    assert rejoin.due == 105.1
    rejoin.done()
    assert rejoin.due is None


def test_a_node_that_only_loses_leases_gives_up_and_a_step_forgives() -> None:
    rejoin = Rejoin(10.0)
    for step in (5, 6):
        for _ in range(REJOINS_MAX):
            rejoin.lost("cut off", step, 0.0)
            rejoin.done()
    with pytest.raises(PlatformError, match="without a new step in between: cut off"):
        rejoin.lost("cut off", 6, 0.0)
