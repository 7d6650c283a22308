"""The leader: rounds, failures, growth, returns, budget, a new leader."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_elastic.core import membership
from autoglm_elastic.core.membership import (
    Adopted,
    Broken,
    Effect,
    Entered,
    Event,
    FailJob,
    Failure,
    Finished,
    FinishJob,
    Generation,
    LeaderState,
    Member,
    MemberDown,
    MemberUp,
    Phase,
    Policy,
    Seal,
    Tick,
    WakeAt,
    start,
)

POLICY = Policy(
    nodes_min=2, nodes_max=3, max_restarts=2, join_window_s=5.0, join_timeout_s=60.0, progress_s=30.0
)


def member(node: str, incarnation: int = 1, nproc: int = 2, role: str = "default") -> Member:
    return Member(node, f"{node}.host", nproc, role, incarnation)


def up(node: str, now: float = 0.0, incarnation: int = 1) -> MemberUp:
    return MemberUp(member(node, incarnation), now)


def death(node: str, step: int = -1, exit_code: int = -9) -> Failure:
    return Failure(node, 1, 1, exit_code, "", step, 0.0)


def broken(node: str, generation: int, now: float = 20.0, step: int = -1) -> Broken:
    return Broken(node, generation, death(node, step), now, 1.0)


class Leader:
    """Feeds a leader and keeps what it did."""

    def __init__(self, policy: Policy = POLICY, first_generation: int = 0) -> None:
        self.state = start(policy, first_generation=first_generation, now=0.0)
        self.effects: list[Effect] = []

    def feed(self, *events: Event) -> Leader:
        for event in events:
            self.state, effects = membership.step(self.state, event)
            self.effects += effects
        return self

    @property
    def seals(self) -> list[Generation]:
        return [effect.generation for effect in self.effects if isinstance(effect, Seal)]

    @property
    def last(self) -> Generation:
        return self.seals[-1]

    @property
    def nodes(self) -> str:
        return "".join(place.node for place in self.last.placements)

    @property
    def failed(self) -> list[FailJob]:
        return [effect for effect in self.effects if isinstance(effect, FailJob)]


def running(nodes: str = "ab", policy: Policy = POLICY) -> Leader:
    leader = Leader(policy).feed(*(up(node) for node in nodes), Tick(5.0))
    assert leader.nodes == nodes
    return leader


def test_the_first_round_seals_at_the_maximum_at_once() -> None:
    leader = Leader(first_generation=7).feed(up("b"), up("a"), up("c"))
    assert leader.nodes == "bac"
    assert (leader.last.number, leader.last.parent, leader.last.world_size) == (7, -1, 6)
    assert not leader.last.planned
    assert leader.last.reason == "first round, 3 nodes"


def test_the_first_round_waits_a_window_after_the_last_join() -> None:
    leader = Leader().feed(up("a", 1.0), up("b", 2.0), Tick(6.9))
    assert leader.seals == []
    assert leader.effects[-1] == WakeAt(7.0)
    assert leader.feed(Tick(7.0)).nodes == "ab"


def test_too_few_for_a_first_round_fails_the_job() -> None:
    leader = Leader().feed(up("a", 1.0), Tick(59.0))
    assert leader.effects[-1] == WakeAt(60.0)
    assert leader.feed(Tick(60.0)).failed == [FailJob("1 node for 60 s, at least 2 needed", None)]


def test_a_dead_worker_on_a_live_node_keeps_the_nodes() -> None:
    leader = running().feed(broken("b", 0))
    assert leader.nodes == "ab"
    assert (leader.last.number, leader.last.parent, leader.last.restart_count) == (1, 0, 1)
    assert not leader.last.planned
    assert leader.last.reason == "rank 1 on node b died: signal 9 (SIGKILL)"


def test_a_generation_breaks_once() -> None:
    leader = running().feed(broken("b", 0), broken("a", 0), broken("b", 0), Finished("a", 0, 21.0))
    assert len(leader.seals) == 2
    assert leader.state.budget.failures == 1
    assert leader.state.finished == frozenset()


def test_a_lost_node_is_left_out_and_ranks_keep_their_order() -> None:
    leader = running("abc").feed(MemberDown("b", 20.0, step=9))
    assert leader.nodes == "ac"
    assert [place.base_rank for place in leader.last.placements] == [0, 2]
    assert leader.last.reason == "node b left"
    assert leader.last.restart_count == 1
    assert leader.last.committed_step == 9


def test_newcomers_come_last_and_are_planned() -> None:
    leader = running("bc").feed(up("a", 30.0))
    assert leader.nodes == "bca"
    assert leader.last.planned
    assert leader.last.reason == "node a joined"
    assert leader.last.restart_count == 0
    assert leader.state.budget.failures == 0


def test_nodes_beyond_the_maximum_are_spares() -> None:
    leader = running("abc").feed(up("d", 6.0), up("e", 7.0))
    assert len(leader.seals) == 1
    leader.feed(MemberDown("a", 20.0))
    assert leader.nodes == "bcd"
    assert leader.last.reason == "node a left; node d joined"


def test_a_node_that_returns_is_a_newcomer() -> None:
    leader = running("abc").feed(MemberDown("a", 20.0), up("a", 25.0, incarnation=2))
    assert leader.nodes == "bca"
    assert leader.last.planned


def test_a_node_that_started_anew_before_it_was_missed_was_lost() -> None:
    leader = running("abc").feed(up("a", 20.0, incarnation=2))
    assert leader.nodes == "bca"
    assert not leader.last.planned
    assert leader.last.reason == "node a started anew"
    assert leader.last.restart_count == 1
    late = leader.feed(MemberDown("a", 21.0, incarnation=1))
    assert late.nodes == "bca"
    assert len(late.seals) == 2


def test_repeated_and_stale_news_change_nothing() -> None:
    leader = running("abc").feed(up("a", 20.0, incarnation=2), broken("b", 1, step=3))
    before = leader.state
    stale: Sequence[Event] = (
        up("a", 30.0, incarnation=2),
        up("a", 30.0, incarnation=1),
        up("b", 30.0),
        MemberDown("x", 30.0),
        broken("a", 1),
        broken("a", 0),
        broken("x", 2),
        Finished("a", 1, 30.0),
        Adopted(leader.seals[0], 30.0),
        Adopted(leader.last, 30.0),
    )
    assert leader.feed(*stale).state == before


def test_a_node_that_went_down_with_a_failure_is_not_charged_again() -> None:
    """Node a is cut from power; b's collective breaks, b is quicker than the end of a's lease."""
    leader = running("abc").feed(broken("b", 0), Entered("b", 1, 20.1), Entered("c", 1, 20.1))
    leader.feed(MemberDown("a", 22.0))
    assert leader.nodes == "bc"
    assert (leader.last.number, leader.last.reason) == (2, "node a left")
    assert (leader.last.restart_count, leader.last.failures) == (1, 1)


def test_a_collective_that_breaks_with_a_node_already_missed_is_not_charged_again() -> None:
    leader = running("abc").feed(MemberDown("a", 20.0), broken("b", 0, 20.1), broken("c", 0, 20.1))
    assert leader.nodes == "bc"
    assert (leader.last.number, leader.last.restart_count, leader.last.failures) == (1, 1, 1)


def test_a_node_that_went_down_and_started_anew_is_not_charged_again() -> None:
    leader = running("abc").feed(broken("b", 0), Entered("b", 1, 20.1), up("a", 21.0, incarnation=2))
    assert leader.nodes == "bca"
    assert (leader.last.reason, leader.last.restart_count) == ("node a started anew", 1)
    leader.feed(MemberDown("a", 23.0))
    assert leader.last.restart_count == 2, "it was alive again, so this is another incident"


def test_nodes_that_go_down_together_are_charged_once() -> None:
    leader = running("abc", replace(POLICY, nodes_min=1)).feed(MemberDown("a", 20.0), MemberDown("c", 20.5))
    assert leader.nodes == "b"
    assert (leader.last.number, leader.last.restart_count) == (2, 1)


def test_a_node_that_entered_since_is_charged() -> None:
    leader = running("abc").feed(broken("b", 0), Entered("a", 1, 20.1), MemberDown("a", 22.0))
    assert leader.last.restart_count == 2


def test_a_node_that_reports_a_dead_worker_and_goes_down_is_charged_once() -> None:
    leader = running("ab").feed(broken("b", 0), up("c", 21.0), MemberDown("b", 22.0))
    assert leader.last.reason == "node b left"
    assert leader.last.restart_count == 1


def test_what_was_entered_before_the_failure_is_no_sign_of_life() -> None:
    leader = running("ab").feed(Entered("a", 0, 6.0), broken("b", 0), Entered("a", 0, 20.1))
    leader.feed(up("c", 21.0), Entered("c", 2, 21.1), MemberDown("a", 22.0))
    assert leader.last.reason == "node a left"
    assert leader.last.restart_count == 1


@pytest.mark.parametrize("entered", [False, True])
def test_a_new_leader_knows_who_went_down_with_the_failure_before(entered: bool) -> None:
    found = running("abc").feed(broken("b", 0)).last
    assert found.unheard == ("a", "b", "c")
    heard = (Entered("a", 1, 100.0),) if entered else ()
    leader = adopt(found, *heard, Entered("c", 1, 100.0), up("b", 100.0), up("c", 100.0))
    leader.feed(MemberDown("a", 100.0))
    assert leader.nodes == "bc"
    assert leader.last.restart_count == (2 if entered else 1)


def test_below_the_minimum_it_waits_and_goes_on_when_somebody_comes() -> None:
    leader = running("ab").feed(MemberDown("a", 20.0))
    assert leader.state.phase is Phase.BROKEN
    assert leader.effects[-1] == WakeAt(80.0)
    leader.feed(broken("b", 0, 21.0), Tick(50.0), up("c", 51.0))
    assert leader.nodes == "bc"
    assert leader.last.reason == "node a left; node c joined"
    assert leader.last.restart_count == 1


def test_below_the_minimum_for_too_long_fails_the_job_and_names_the_failure() -> None:
    leader = running("ab").feed(MemberDown("a", 20.0), Tick(80.0))
    (failed,) = leader.failed
    assert failed.reason == "1 node for 60 s, at least 2 needed; first failure: node a left"
    assert leader.feed(up("a", 81.0, incarnation=2)).effects[-1] is failed


def test_failures_without_progress_end_the_job_with_the_first_error() -> None:
    leader = running("ab")
    first = Failure("a", 0, 0, 1, "ValueError: boom", 5, 0.0)
    leader.feed(Broken("a", 0, first, 20.0, 1.0), broken("b", 1, step=5))
    leader.feed(Entered("b", 2, 21.0), MemberDown("b", 22.0))
    (failed,) = leader.failed
    assert failed.first_failure == first
    assert failed.reason == (
        "3 failures without a new committed step (2 allowed); "
        "first: rank 0 on node a died: exit code 1: ValueError: boom"
    )
    assert leader.state.phase is Phase.ENDED


def test_progress_is_forgiven_for_ever() -> None:
    leader = running("ab")
    for number in range(20):
        leader.feed(broken("a", number, step=number))
    assert leader.last.number == 20
    assert leader.last.restart_count == 20
    assert leader.failed == []


def test_the_job_finishes_when_all_its_nodes_have() -> None:
    leader = running("ab").feed(Finished("a", 0, 20.0), MemberDown("a", 21.0), Finished("a", 0, 22.0))
    assert not any(isinstance(effect, FinishJob) for effect in leader.effects)
    leader.feed(Finished("b", 0, 23.0))
    assert leader.effects[-1] == FinishJob()
    assert leader.failed == []


def test_finished_nodes_are_not_placed_again_and_nobody_joins_the_end() -> None:
    policy = replace(POLICY, nodes_min=1)
    leader = running("ab", policy).feed(Finished("a", 0, 20.0), up("c", 21.0))
    assert len(leader.seals) == 1
    leader.feed(broken("b", 0, 22.0))
    assert leader.nodes == "bc"
    leader.feed(Finished("b", 1, 30.0), Finished("c", 1, 30.0))
    assert leader.effects[-1] == FinishJob()


def test_a_node_that_is_lost_after_its_workers_finished_ends_nothing() -> None:
    """Its agent slept while its workers finished: the lease was lost first, the news came after."""
    leader = running("ab").feed(Finished("a", 0, 20.0), MemberDown("b", 21.0), Finished("b", 0, 22.0))
    assert leader.effects[-1] == FinishJob()
    assert leader.failed == []


def test_finished_nodes_count_towards_the_minimum() -> None:
    leader = running("ab").feed(Finished("a", 0, 20.0), broken("b", 0, 21.0))
    assert leader.nodes == "b"


def test_the_job_may_end_in_the_generation_that_a_planned_one_grew_from() -> None:
    leader = running("ab").feed(up("c", 20.0))
    assert leader.last.grown_from == ((0, 2),)
    leader.feed(Finished("a", 0, 21.0), Finished("c", 0, 21.0), Finished("b", 0, 22.0))
    assert leader.effects[-1] == FinishJob()


def test_what_breaks_before_a_planned_generation_is_entered_breaks_it() -> None:
    leader = running("ab").feed(up("c", 20.0), Finished("a", 0, 21.0), broken("b", 0, 22.0))
    assert leader.nodes == "bc"
    assert leader.last.grown_from == ()
    before = leader.state
    assert leader.feed(broken("b", 0, 23.0), broken("b", 1, 23.0), Finished("b", 1, 23.0)).state == before


def test_too_few_because_the_others_are_done_says_so() -> None:
    leader = running("ab").feed(Finished("a", 0, 20.0), MemberDown("b", 21.0), Tick(81.0))
    assert leader.failed[0].reason.startswith("0 nodes for 60 s, at least 2 needed (node a already finished)")


def adopt(found: Generation, *events: Event, policy: Policy = POLICY) -> Leader:
    return Leader(policy).feed(Adopted(found, 100.0), *events)


def test_a_new_leader_adopts_what_is_sealed_and_only_waits_for_the_unseen() -> None:
    found = running("abc").last
    leader = adopt(found, up("a", 100.0), up("b", 100.0), Tick(104.9))
    assert leader.seals == []
    assert leader.effects[-1] == WakeAt(105.0)
    leader.feed(Tick(105.0))
    assert leader.nodes == "ab"
    assert leader.last.number == 1
    assert leader.last.reason == "node c left"


def test_a_new_leader_that_finds_everybody_changes_nothing() -> None:
    found = running("abc").last
    leader = adopt(found, up("a", 100.0), up("b", 100.0), up("c", 100.0), Tick(200.0))
    assert leader.seals == []
    leader.feed(MemberDown("b", 201.0))
    assert leader.nodes == "ac"


def test_a_new_leader_hears_that_an_unseen_node_is_gone_and_waits_no_longer_than_it_must() -> None:
    found = running("abc").last
    assert adopt(found, up("a", 100.0), up("b", 100.0), MemberDown("c", 100.5)).nodes == "ab"


def test_a_new_leader_notices_that_a_node_started_anew() -> None:
    found = running("abc").last
    leader = adopt(found, up("a", 100.0), up("b", 100.0, incarnation=2), up("c", 100.0))
    assert leader.nodes == "acb"
    assert not leader.last.planned


def test_members_met_before_the_adoption_count() -> None:
    found = running("abc").last
    leader = Leader().feed(up("a", 1.0), up("c", 1.0, incarnation=3), Adopted(found, 100.0), up("b", 101.0))
    assert leader.nodes == "abc"
    assert leader.last.reason == "node c started anew"


def test_a_new_leader_remembers_the_budget() -> None:
    leader = running("ab").feed(broken("a", 0, step=5), broken("b", 1, step=5))
    found = Generation.from_json(json.loads(json.dumps(leader.last.to_json())))
    assert found == leader.last
    heir = adopt(found, up("a", 100.0), up("b", 100.0), broken("a", 2, step=5))
    assert heir.failed[0].first_failure == death("a", 5)


NO_RESTARTS = replace(POLICY, nodes_min=1, max_restarts=0)


def test_a_job_started_again_is_not_charged_for_the_nodes_that_were_killed_before() -> None:
    found = running("ab", NO_RESTARTS).last
    heir = Leader(NO_RESTARTS).feed(
        Adopted(found, 100.0, inside=False), Entered("a", 0, 100.0), Entered("b", 0, 100.0)
    )
    heir.feed(up("a", 100.0), up("c", 100.0), up("b", 100.0), Entered("c", 1, 100.5))
    assert heir.nodes == "abc", "neither has been missed yet"
    heir.feed(MemberDown("a", 101.0))
    assert heir.nodes == "bc"
    heir.feed(Entered("c", 2, 101.0), MemberDown("b", 101.5))
    assert heir.nodes == "c"
    assert heir.failed == []
    assert heir.last.failures == 0
    heir.feed(broken("c", heir.last.number))
    assert heir.failed, "what happens from now on is charged"


def test_a_node_that_comes_back_alone_is_not_charged_for_its_former_self() -> None:
    found = running("a", NO_RESTARTS).last
    heir = Leader(NO_RESTARTS).feed(Adopted(found, 100.0, inside=False), up("a", 100.0, incarnation=2))
    assert heir.nodes == "a"
    assert heir.failed == []
    assert (heir.last.restart_count, heir.last.failures) == (1, 0)


def test_a_node_that_lives_on_under_a_leader_from_elsewhere_is_charged() -> None:
    found = running("ab", NO_RESTARTS).last
    heir = Leader(NO_RESTARTS).feed(
        Adopted(found, 100.0, inside=False), up("a", 100.0), up("c", 100.0), up("b", 100.0)
    )
    heir.feed(Entered("a", 1, 100.5), Entered("b", 1, 100.5), Entered("c", 1, 100.5), MemberDown("a", 101.0))
    assert heir.failed


def test_a_new_leader_from_the_midst_charges_the_one_before() -> None:
    found = running("ab", NO_RESTARTS).last
    assert adopt(found, up("b", 100.0), MemberDown("a", 100.0), policy=NO_RESTARTS).failed


def test_roles_and_uneven_nodes_get_their_ranks() -> None:
    leader = Leader(replace(POLICY, nodes_max=4)).feed(
        MemberUp(member("a", nproc=1, role="x"), 0.0),
        MemberUp(member("b", nproc=3, role="y"), 0.0),
        MemberUp(member("c", nproc=2, role="x"), 0.0),
        Tick(5.0),
    )
    places = {
        place.node: (place.group_rank, place.base_rank, place.role_base_rank)
        for place in leader.last.placements
    }
    assert places == {"a": (0, 0, 0), "b": (1, 1, 0), "c": (2, 4, 1)}
    assert leader.last.role_world_size("x") == 3
    assert leader.last.placement("z") is None


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="valid: 1 <= min <= max"):
        replace(POLICY, nodes_min=4)
    with pytest.raises(ValueError, match="at least 1"):
        member("a", nproc=0)
    bad = running("ab").last.to_json() | {"world_size": 5}
    with pytest.raises(ValueError, match="do not agree"):
        Generation.from_json(bad)


NODES = st.sampled_from("abcd")
raw_events = st.one_of(
    st.tuples(st.just("up"), NODES, st.integers(1, 3)),
    st.tuples(st.just("down"), NODES, st.integers(-1, 9)),
    st.tuples(st.just("broken"), NODES, st.integers(0, 6)),
    st.tuples(st.just("entered"), NODES, st.integers(0, 6)),
    st.tuples(st.just("finished"), NODES, st.integers(0, 6)),
    st.tuples(st.just("tick"), st.just(""), st.sampled_from([0, 1, 6, 70])),
    st.tuples(st.just("adopt"), st.just(""), st.just(0)),
)


def check(leader: Leader, before: LeaderState, effects: Sequence[Effect]) -> None:
    state = leader.state
    seals = [effect.generation for effect in effects if isinstance(effect, Seal)]
    assert len(seals) <= 1
    for sealed in seals:
        nodes = [place.node for place in sealed.placements]
        live = {item.node: item.incarnation for item in state.members}
        assert sealed.number >= before.next_number
        assert 1 <= len(nodes) <= POLICY.nodes_max
        assert len(nodes) + len(state.finished) >= POLICY.nodes_min
        assert len(set(nodes)) == len(nodes)
        assert not set(nodes) & state.finished
        assert all(live[place.node] == place.incarnation for place in sealed.placements)
        ranks = [rank for p in sealed.placements for rank in range(p.base_rank, p.base_rank + p.nproc)]
        assert ranks == list(range(sealed.world_size))
        assert Generation.from_json(json.loads(json.dumps(sealed.to_json()))) == sealed
        previous = before.generation
        if sealed.planned:
            assert previous is not None
            assert nodes[: len(previous.placements)] == [place.node for place in previous.placements]
            assert sealed.restart_count == before.restart_count
    assert (state.phase is Phase.ENDED) == any(isinstance(e, FailJob | FinishJob) for e in leader.effects)
    waiting = state.phase in (Phase.FORMING, Phase.BROKEN) or state.unseen
    # Whoever waits has said when to wake it: the job cannot hang (I8).
    assert not waiting or any(isinstance(effect, WakeAt) for effect in leader.effects) or not leader.effects


@settings(max_examples=300, deadline=None)
@given(st.lists(raw_events, max_size=40))
def test_no_order_of_news_breaks_the_rules(events: list[tuple[str, str, int]]) -> None:
    leader = Leader()
    now = 0.0
    for kind, node, number in events:
        before, count = leader.state, len(leader.effects)
        match kind:
            case "up":
                leader.feed(up(node, now, number))
            case "down":
                leader.feed(MemberDown(node, now, number))
            case "broken":
                leader.feed(broken(node, number, now))
            case "entered":
                leader.feed(Entered(node, number, now))
            case "finished":
                leader.feed(Finished(node, number, now))
            case "tick":
                now += number
                leader.feed(Tick(now))
            case _ if leader.state.generation is not None and leader.state.phase is not Phase.ENDED:
                found, members = leader.state.generation, leader.state.members
                heir = Leader()
                heir.feed(Adopted(found, now), *(MemberUp(item, now) for item in members))
                assert all(seal.number > found.number for seal in heir.seals)
        check(leader, before, leader.effects[count:])
    # Silence for long enough ends every wait.
    for _ in range(3):
        now += POLICY.join_timeout_s + POLICY.join_window_s
        leader.feed(Tick(now))
    assert leader.state.phase in (Phase.RUNNING, Phase.ENDED)
