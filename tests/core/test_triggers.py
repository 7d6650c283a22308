"""All ranks find the same answer to a trigger, whatever the order in which they meet it and hear of rulings."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from autoglm_elastic.core.triggers import Answering, Following

TRIGGERS = 12


class World:
    """Rank 0 and one other rank, and what is on its way from the one to the other, in order."""

    def __init__(self, limit: int) -> None:
        self.leading, self.following = Answering(limit), Following(limit)
        self.answers: list[bool] = []
        self.found: list[bool] = []
        self.doubted = 0
        self.rulings: deque[int] = deque()
        self.waiting = False

    def lead(self) -> None:
        self.leading, go = self.leading.trigger()
        self.answers.append(go)

    def rule(self) -> None:
        self.leading, answered = self.leading.ruled()
        self.rulings.append(answered)

    def hear(self) -> None:
        self.following = self.following.ruled(self.rulings.popleft())
        if self.waiting:
            self.settle(self.following.expect())

    def follow(self) -> None:
        self.following, expected = self.following.trigger()
        self.settle(expected)

    def settle(self, expected: bool | None) -> None:
        """As it follows; or as it is heard, which may be before or after."""
        self.waiting = expected is None
        if expected is not None:
            self.found.append(expected)
            self.following = self.following.answer(expected)

    def listen(self) -> None:
        """In doubt, and rank 0's answer is there."""
        self.doubted += 1
        self.settle(self.answers[len(self.found)])

    def may(self) -> list[str]:
        able = []
        if len(self.answers) < TRIGGERS:
            able.append("lead")
        # A ruling needs the vote of every rank: it has begun the snapshot, too.
        if self.leading.in_flight and sum(self.found) >= sum(self.answers) - self.leading.in_flight + 1:
            able.append("rule")
        if self.rulings:
            able.append("hear")
        if self.waiting and len(self.answers) > len(self.found):
            able.append("listen")
        if not self.waiting and len(self.found) < TRIGGERS:
            able.append("follow")
        return able


@given(st.integers(1, 3), st.data())
def test_all_ranks_answer_alike_in_any_order(limit: int, data: st.DataObject) -> None:
    world = World(limit)
    while able := world.may():
        getattr(world, data.draw(st.sampled_from(able)))()
        both = min(len(world.answers), len(world.found))
        assert world.found[:both] == world.answers[:both]
    assert len(world.answers) == len(world.found) == TRIGGERS, "nobody waits for ever"


@given(st.integers(1, 3), st.integers(1, 40))
def test_who_knows_the_rulings_asks_nobody(limit: int, triggers: int) -> None:
    world = World(limit)
    for _ in range(triggers):
        world.follow()
        world.lead()
        world.rule()
        world.hear()
    assert world.found == world.answers == [True] * triggers
    assert not world.doubted


def test_a_snapshot_that_is_agreed_on_otherwise_counts_for_all_ranks() -> None:
    leading, following = Answering(1).begin(), Following(1).begin()
    leading, go = leading.trigger()
    following, expected = following.trigger()
    assert (go, expected) == (False, None)
    leading, answered = leading.ruled()
    following = following.answer(go).ruled(answered)
    assert (leading.trigger()[1], following.trigger()[1]) == (True, True)


def test_a_snapshot_in_flight_at_a_trigger_counts_although_its_ruling_is_known() -> None:
    leading, following = Answering(1), Following(1)
    leading, _ = leading.trigger()
    following, _ = following.trigger()
    following = following.answer(True)
    leading, second = leading.trigger()
    leading, answered = leading.ruled()
    following = following.ruled(answered)  # before this rank comes to its second trigger
    following, expected = following.trigger()
    assert second is expected is False
    assert following.answer(False).trigger()[1] is leading.trigger()[1] is True


def test_what_is_known_of_rulings_does_not_grow_with_the_job() -> None:
    agreed, asked = Following(1), Following(1)
    for step in range(1000):
        agreed = agreed.begin().ruled(0)
        asked = asked.trigger()[0].answer(True).ruled(step + 1)
    assert len(agreed.until) <= 1
    assert len(asked.until) <= 1
