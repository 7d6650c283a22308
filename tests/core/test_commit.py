"""The two-phase commit: every order of votes, losses, unknown outcomes and late messages."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_elastic.core.commit import (
    SETTLE_ATTEMPTS_MAX,
    Announce,
    CoalescingTrigger,
    Coordinator,
    CoordinatorEffect,
    CoordinatorEvent,
    CoordinatorPhase,
    Decision,
    Discard,
    EntryPut,
    EntryRead,
    HintsMoved,
    ManifestWritten,
    MoveHints,
    Participant,
    ParticipantEffect,
    ParticipantEvent,
    ParticipantPhase,
    PeerLost,
    PutEntry,
    ReadEntry,
    Release,
    SendVote,
    Snapshot,
    Stage,
    Staged,
    TakeBack,
    Timeout,
    Trigger,
    Verdict,
    Vote,
    VoteFrom,
    WriteManifest,
    WritePacks,
    Written,
)
from autoglm_elastic.core.outcome import Outcome

S = Snapshot(120, 3)
OTHERS = (Snapshot(119, 3), Snapshot(120, 2), Snapshot(130, 3))


def coordinate(*events: CoordinatorEvent, world: int = 2) -> tuple[Coordinator, list[CoordinatorEffect]]:
    machine, effects = Coordinator(3, world), []
    for event in events:
        machine, new = machine.step(event)
        effects += new
    return machine, effects


def take_part(*events: ParticipantEvent) -> tuple[Participant, list[ParticipantEffect]]:
    machine, effects = Participant(3), []
    for event in events:
        machine, new = machine.step(event)
        effects += new
    return machine, effects


def prepared(rank: int) -> VoteFrom:
    return VoteFrom(rank, S, Vote.PREPARED, b"%d" % rank)


VOTED = (Trigger(S), prepared(1), prepared(0))
MANIFEST = WriteManifest(S, (b"0", b"1"))


def test_the_good_case_in_full() -> None:
    machine, effects = coordinate(
        *VOTED, ManifestWritten(S, Outcome.OK), EntryPut(S, Outcome.OK), HintsMoved(S, True)
    )
    assert effects == [MANIFEST, PutEntry(S), Announce(S, Verdict.COMMIT), MoveHints(S)]
    assert machine == Coordinator(3, 2)
    _, mine = take_part(Trigger(S), Staged(S), Written(S, True, b"table"), Decision(S, Verdict.COMMIT))
    assert mine == [Stage(S), WritePacks(S), SendVote(S, Vote.PREPARED, b"table"), Release(S)]
    assert S.entry == "000000000120-g3"


def test_one_abort_vote_aborts() -> None:
    machine, effects = coordinate(Trigger(S), prepared(1), VoteFrom(0, S, Vote.ABORT, reason="disk full"))
    assert effects == [Announce(S, Verdict.ABORT, "rank 0: disk full")]
    assert machine.phase is CoordinatorPhase.IDLE


def test_a_lost_peer_aborts_before_the_votes_are_in_and_not_after() -> None:
    assert coordinate(Trigger(S), prepared(0), PeerLost("rank 1"))[1] == [
        Announce(S, Verdict.ABORT, "rank 1")
    ]
    assert coordinate(*VOTED, PeerLost("rank 1"))[1] == [MANIFEST]


def test_a_missing_vote_is_named() -> None:
    _, effects = coordinate(Trigger(S), prepared(1), Timeout(S), world=4)
    assert effects == [Announce(S, Verdict.ABORT, "no vote in time from rank 0, 2, 3")]


@pytest.mark.parametrize("event", [ManifestWritten(S, Outcome.UNKNOWN), Timeout(S)])
def test_a_manifest_that_is_not_confirmed_aborts(event: CoordinatorEvent) -> None:
    machine, effects = coordinate(*VOTED, event)
    assert isinstance(effects[-1], Announce)
    assert effects[-1].verdict is Verdict.ABORT
    assert machine.phase is CoordinatorPhase.IDLE


def test_a_manifest_that_is_there_already_is_the_same_one() -> None:
    assert coordinate(*VOTED, ManifestWritten(S, Outcome.CONFLICT))[1] == [MANIFEST, PutEntry(S)]


PUT = (*VOTED, ManifestWritten(S, Outcome.OK))


def test_an_unknown_entry_is_settled_by_reading() -> None:
    _, effects = coordinate(*PUT, EntryPut(S, Outcome.UNKNOWN), EntryRead(S, True))
    assert effects[1:] == [PutEntry(S), ReadEntry(S), Announce(S, Verdict.COMMIT), MoveHints(S)]


def test_an_absent_entry_is_put_again_because_the_first_put_may_still_land() -> None:
    _, effects = coordinate(
        *PUT, Timeout(S), EntryRead(S, False), EntryPut(S, Outcome.CONFLICT), EntryRead(S, True)
    )
    assert effects[1:] == [
        PutEntry(S), ReadEntry(S), PutEntry(S), ReadEntry(S), Announce(S, Verdict.COMMIT), MoveHints(S),
    ]  # fmt: skip


@pytest.mark.parametrize("outcome", [Outcome.UNKNOWN, Outcome.CONFLICT])
@pytest.mark.parametrize("present", [False, None])
def test_what_cannot_be_settled_is_never_called_aborted(outcome: Outcome, present: bool | None) -> None:
    machine, effects = coordinate(*PUT)
    for _ in range(2 * SETTLE_ATTEMPTS_MAX):
        if machine.phase is CoordinatorPhase.PUTTING:
            machine, new = machine.step(EntryPut(S, outcome))
        else:
            machine, new = machine.step(EntryRead(S, present))
        effects += new
    assert machine.phase is CoordinatorPhase.IDLE
    assert isinstance(effects[-1], Announce)
    assert effects[-1].verdict is Verdict.UNKNOWN


@pytest.mark.parametrize("late", [True, None])
def test_a_prepare_that_is_too_old_is_aborted_before_anything_is_asked_for(late: bool | None) -> None:
    machine, effects = coordinate(*VOTED, ManifestWritten(S, Outcome.OK, late))
    assert [effects[0], machine.phase] == [MANIFEST, CoordinatorPhase.IDLE]
    assert isinstance(effects[1], Announce)
    assert effects[1].verdict is Verdict.ABORT
    assert "first pack" in effects[1].reason


@pytest.mark.parametrize(
    "there",
    [
        (EntryPut(S, Outcome.OK, True),),
        (EntryPut(S, Outcome.UNKNOWN, True), EntryRead(S, True, True)),
        (EntryPut(S, Outcome.UNKNOWN), EntryRead(S, False), EntryPut(S, Outcome.OK, True)),
    ],
)
def test_an_entry_that_came_too_late_is_taken_back_and_nothing_promised(
    there: tuple[CoordinatorEvent, ...],
) -> None:
    machine, effects = coordinate(*PUT, *there)
    assert machine.phase is CoordinatorPhase.IDLE
    assert effects[-2] == TakeBack(S)
    assert isinstance(effects[-1], Announce)
    assert effects[-1].verdict is Verdict.UNKNOWN


def test_an_entry_of_which_nobody_can_tell_whether_it_came_in_time_stays_and_is_not_promised() -> None:
    _, effects = coordinate(*PUT, EntryPut(S, Outcome.OK, None))
    assert isinstance(effects[-1], Announce)
    assert effects[-1].verdict is Verdict.UNKNOWN
    assert TakeBack(S) not in effects


@pytest.mark.parametrize("snapshot", OTHERS)
def test_what_names_another_snapshot_or_generation_is_ignored(snapshot: Snapshot) -> None:
    machine, _ = coordinate(Trigger(S), prepared(0))
    for event in (VoteFrom(1, snapshot, Vote.PREPARED), VoteFrom(1, snapshot, Vote.ABORT), Timeout(snapshot)):
        assert machine.step(event) == (machine, ())
    voted, _ = take_part(Trigger(S), Staged(S), Written(S, True))
    for decision in (Decision(snapshot, Verdict.ABORT), Decision(snapshot, Verdict.COMMIT)):
        assert voted.step(decision) == (voted, ())


def test_a_vote_counts_once_and_only_from_a_rank_of_the_world() -> None:
    machine, effects = coordinate(Trigger(S), prepared(0), prepared(0), prepared(2), prepared(-1))
    assert effects == []
    assert machine.phase is CoordinatorPhase.COLLECTING


def test_a_trigger_of_another_generation_or_while_busy_is_ignored() -> None:
    assert coordinate(Trigger(OTHERS[1]))[0].phase is CoordinatorPhase.IDLE
    assert coordinate(Trigger(S), Trigger(OTHERS[2]))[0].snapshot == S
    assert take_part(Trigger(OTHERS[1])) == (Participant(3), [])


def test_a_participant_that_cannot_write_votes_abort_and_forgets() -> None:
    for events in ((Trigger(S),), (Trigger(S), Staged(S))):
        machine, effects = take_part(*events, Written(S, False, reason="EIO"))
        assert effects[-2:] == [SendVote(S, Vote.ABORT, reason="EIO"), Discard(S)]
        assert machine.phase is ParticipantPhase.IDLE


def test_who_has_voted_keeps_the_packs_when_the_decision_is_not_heard() -> None:
    voted = (Trigger(S), Staged(S), Written(S, True))
    assert take_part(*voted, PeerLost())[1][-1] == Release(S)
    assert take_part(*voted, Decision(S, Verdict.UNKNOWN))[1][-1] == Release(S)
    assert take_part(*voted, Trigger(OTHERS[2]))[1][-2:] == [Release(S), Stage(OTHERS[2])]
    assert take_part(*voted, Decision(S, Verdict.ABORT))[1][-1] == Discard(S)


def test_who_has_not_voted_discards() -> None:
    for events in ((Trigger(S),), (Trigger(S), Staged(S))):
        for end in (PeerLost(), Decision(S, Verdict.ABORT), Trigger(OTHERS[2])):
            assert Discard(S) in take_part(*events, end)[1]


def test_an_older_or_repeated_trigger_changes_nothing() -> None:
    machine, _ = take_part(Trigger(S))
    assert machine.step(Trigger(S)) == (machine, ())
    assert machine.step(Trigger(OTHERS[0])) == (machine, ())


def test_triggers_coalesce_into_one_more() -> None:
    trigger, start = CoalescingTrigger().request()
    assert start
    for _ in range(3):
        trigger, start = trigger.request()
        assert not start
    assert trigger.coalesced == 2
    trigger, start = trigger.settled()
    assert start
    trigger, start = trigger.settled()
    assert not start
    assert not trigger.in_flight


LATE = st.sampled_from([False, True, None])
coordinator_events = st.one_of(
    st.builds(Trigger, st.sampled_from([S, *OTHERS])),
    st.builds(VoteFrom, st.integers(-1, 3), st.sampled_from([S, *OTHERS]), st.sampled_from(Vote)),
    st.builds(ManifestWritten, st.just(S), st.sampled_from(Outcome), LATE),
    st.builds(EntryPut, st.just(S), st.sampled_from(Outcome), LATE),
    st.builds(EntryRead, st.just(S), st.sampled_from([True, False, None]), LATE),
    st.builds(HintsMoved, st.just(S), st.booleans()),
    st.builds(PeerLost),
    st.builds(Timeout, st.just(S)),
)


@given(st.lists(coordinator_events, max_size=40))
def test_no_order_of_events_breaks_the_rules(events: Sequence[CoordinatorEvent]) -> None:
    machine = Coordinator(3, 2)
    voted: set[int] = set()
    manifest = asked = False
    for event in events:
        before = machine
        machine, effects = machine.step(event)
        if isinstance(event, Trigger) and before.snapshot is None:
            voted, manifest, asked = set(), False, False
        if isinstance(event, VoteFrom) and event.snapshot == before.snapshot and event.vote is Vote.PREPARED:
            voted.add(event.rank)
        if isinstance(event, ManifestWritten) and event.outcome is not Outcome.UNKNOWN:
            manifest |= before.phase is CoordinatorPhase.MANIFEST
        for effect in effects:
            assert effect.snapshot == before.snapshot
            if isinstance(effect, WriteManifest):
                assert voted >= {0, 1}
            if isinstance(effect, PutEntry):
                assert voted >= {0, 1}
                assert manifest
                asked = True
            if isinstance(effect, Announce):
                assert effect.verdict is not Verdict.ABORT or not asked
                assert effect.verdict is not Verdict.COMMIT or asked
                in_time = getattr(event, "late", False) is False
                assert effect.verdict is not Verdict.COMMIT or in_time
        assert machine.attempts <= 2 * SETTLE_ATTEMPTS_MAX
        assert (machine.snapshot is None) == (machine.phase is CoordinatorPhase.IDLE)


participant_events = st.one_of(
    st.builds(Trigger, st.sampled_from([S, *OTHERS])),
    st.builds(Staged, st.sampled_from([S, *OTHERS])),
    st.builds(Written, st.sampled_from([S, *OTHERS]), st.booleans()),
    st.builds(Decision, st.sampled_from([S, *OTHERS]), st.sampled_from(Verdict)),
    st.builds(PeerLost),
)


@given(st.lists(participant_events, max_size=40))
def test_what_is_staged_is_freed_exactly_once(events: Sequence[ParticipantEvent]) -> None:
    machine = Participant(3)
    held: list[Snapshot] = []
    for event in events:
        machine, effects = machine.step(event)
        for effect in effects:
            if isinstance(effect, Stage):
                assert not held
                held.append(effect.snapshot)
            elif isinstance(effect, Discard | Release):
                held.remove(effect.snapshot)
        assert held == ([] if machine.snapshot is None else [machine.snapshot])
