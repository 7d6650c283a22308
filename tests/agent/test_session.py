"""A node's membership: joining, leading, failing over, fencing; in memory and between real processes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest

from autoglm_elastic.agent._keys import Keys
from autoglm_elastic.agent.session import (
    Closed,
    LeaseLost,
    NodeSession,
    NotJoined,
    RunClosed,
    Sealed,
    SessionEvent,
    StoreBack,
    StoreLost,
    Superseded,
)
from autoglm_elastic.coordination import MemoryStore, StoreClient, StoreServer
from autoglm_elastic.core.membership import Failure, Generation, Policy
from autoglm_elastic.ports import (
    Compare,
    Delete,
    EventKind,
    Put,
    Store,
    StoreUnavailable,
    Txn,
    Watch,
    WatchEvent,
)

WAIT_S = 30.0


def policy(nodes_min: int, nodes_max: int, max_restarts: int = 3) -> Policy:
    return Policy(
        nodes_min, nodes_max, max_restarts, join_window_s=0.2, join_timeout_s=WAIT_S, progress_s=3600.0
    )


def failure(node: str, message: str = "boom") -> Failure:
    return Failure(node, 0, 0, 1, message, -1, 0.0)


class Node:
    """A session and the events taken from it so far, waited for through its descriptor."""

    def __init__(self, store: Store, name: str, rules: Policy, **options: Any) -> None:
        # A lease so long that a busy machine cannot end it by chance.
        settings = {"run_id": "run/1", "host": "127.0.0.1", "nproc": 2, "role": "trainer", "lease_s": 600.0}
        settings |= options
        self.name = name
        self.session = NodeSession(store, node=name, policy=rules, **settings)
        self._poll = select.poll()
        self._poll.register(self.session.events_fd, select.POLLIN)
        self._taken: list[SessionEvent] = []

    def wait_for(self, wanted: Callable[[SessionEvent], bool]) -> Any:
        """The next event that is wanted; those before it are dropped."""
        while True:
            while self._taken:
                event = self._taken.pop(0)
                if wanted(event):
                    return event
            assert self._poll.poll(WAIT_S * 1000), f"{self.name}: no event within {WAIT_S} s"
            self._taken += self.session.take_events()

    def sealed(self, nodes: Sequence[str]) -> Generation:
        """The next generation with exactly these nodes, in order."""
        event = self.wait_for(
            lambda event: (
                isinstance(event, Sealed)
                and [place.node for place in event.generation.placements] == list(nodes)
            )
        )
        generation = event.generation
        assert isinstance(generation, Generation)
        return generation

    def numbered(self, number: int) -> Generation:
        event = self.wait_for(lambda event: isinstance(event, Sealed) and event.generation.number == number)
        generation = event.generation
        assert isinstance(generation, Generation)
        return generation

    def closed(self) -> Closed:
        event = self.wait_for(lambda event: isinstance(event, Closed))
        assert isinstance(event, Closed)
        return event

    def lease_lost(self) -> LeaseLost:
        event = self.wait_for(lambda event: isinstance(event, LeaseLost))
        assert isinstance(event, LeaseLost)
        return event


class Nodes:
    """Makes nodes on one store and closes them."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.made: list[Node] = []

    def __call__(self, name: str, rules: Policy, *, store: Store | None = None, **options: Any) -> Node:
        node = Node(store or self.store, name, rules, **options)
        self.made.append(node)
        node.session.join()
        return node

    def close(self) -> None:
        for node in self.made:
            node.session.close()
        self.store.close()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.close()


def test_two_nodes_are_sealed_together_with_their_ranks(nodes: Nodes) -> None:
    a = nodes("a", policy(2, 2))
    b = nodes("b", policy(2, 2), nproc=3)
    generation = a.sealed(["a", "b"])
    assert b.sealed(["a", "b"]) == generation
    assert (generation.number, generation.parent, generation.world_size) == (1, -1, 5)
    assert [(place.node, place.base_rank) for place in generation.placements] == [("a", 0), ("b", 2)]
    assert a.session.is_leader()
    assert not b.session.is_leader()
    assert a.session.generation() == generation
    assert list(a.session.members()) == ["a", "b"]


def test_the_first_generation_has_the_number_that_was_asked_for(nodes: Nodes) -> None:
    assert nodes("a", policy(1, 1), first_generation=7).sealed(["a"]).number == 7


def test_a_newcomer_is_let_in_as_planned_and_one_too_many_waits(nodes: Nodes) -> None:
    a = nodes("a", policy(1, 2))
    a.sealed(["a"])
    b = nodes("b", policy(1, 2))
    grown = a.sealed(["a", "b"])
    assert grown.planned
    assert b.sealed(["a", "b"]).parent == 1
    c = nodes("c", policy(1, 2))
    b.session.leave()
    assert not a.sealed(["a", "c"]).planned
    c.sealed(["a", "c"])
    assert c.session.waiting() == 0
    b.session.join()
    # There is no event for who waits; the session's own condition is notified after every change.
    with a.session._loop.changed:
        assert a.session._loop.changed.wait_for(lambda: a.session.waiting() == 1, WAIT_S)


def test_a_node_that_leaves_is_replaced_by_nobody_when_there_are_enough(nodes: Nodes) -> None:
    a, b = nodes("a", policy(1, 2)), nodes("b", policy(1, 2))
    a.sealed(["a", "b"])
    b.session.close()
    generation = a.sealed(["a"])
    assert not generation.planned
    assert generation.restart_count == 1


def test_a_break_is_repaired_with_everybody_still_there(nodes: Nodes) -> None:
    a, b = nodes("a", policy(2, 2)), nodes("b", policy(2, 2))
    first = b.sealed(["a", "b"])
    b.session.report_broken(first.number, failure("b"), 1.0)
    second = b.sealed(["a", "b"])
    assert (second.number, second.parent, second.planned) == (2, 1, False)
    a.session.report_broken(first.number, failure("a", "an echo"), 1.0)
    b.session.report_broken(second.number, failure("b", "again"), 1.0)
    third = b.sealed(["a", "b"])
    assert (third.number, third.restart_count) == (3, 2)
    assert "again" in third.reason


def test_too_many_failures_close_the_run_and_the_first_is_named(nodes: Nodes) -> None:
    a, b = nodes("a", policy(2, 2, max_restarts=1)), nodes("b", policy(2, 2, max_restarts=1))
    b.session.report_broken(b.sealed(["a", "b"]).number, failure("b", "the cause"), 0.1)
    a.session.report_broken(a.numbered(2).number, failure("a"), 0.1)
    for node in (a, b):
        closed = node.closed()
        assert closed.outcome == "failed"
        assert closed.first_failure is not None
        assert closed.first_failure.message == "the cause"
    with pytest.raises(RunClosed):
        a.session.wait_sealed(2, WAIT_S)
    with pytest.raises(RunClosed):
        nodes("c", policy(2, 2))


def test_a_run_is_done_when_every_node_has_finished(nodes: Nodes) -> None:
    a, b = nodes("a", policy(2, 2)), nodes("b", policy(2, 2))
    number = a.sealed(["a", "b"]).number
    a.session.report_finished(number)
    assert not a.session.wait_finished(number, 0.01)
    b.session.report_finished(number)
    assert a.session.wait_finished(number, WAIT_S)
    assert (a.closed().outcome, b.closed().outcome) == ("done", "done")


def test_a_finished_node_is_not_placed_again_by_a_new_leader_either(nodes: Nodes) -> None:
    rules = policy(1, 3)
    a, b, c = (nodes(name, rules) for name in "abc")
    number = c.sealed(["a", "b", "c"]).number
    b.session.report_finished(number)
    c.session.report_broken(number, failure("c"), 1.0)
    c.sealed(["a", "c"])
    a.session.close()
    c.sealed(["c"])
    assert c.session.waiting() == 0


def test_when_the_leader_goes_another_takes_over_and_numbers_go_on(nodes: Nodes) -> None:
    rules = policy(1, 3)
    a, b, c = (nodes(name, rules) for name in "abc")
    b.sealed(["a", "b", "c"])
    a.session.close()
    generation = b.sealed(["b", "c"])
    assert (generation.number, generation.parent) == (2, 1)
    assert b.session.is_leader() != c.session.is_leader()
    assert generation.restart_count == 1


def test_a_report_made_while_nobody_led_is_read_by_the_next_leader(nodes: Nodes) -> None:
    rules = policy(2, 2)
    a, b = nodes("a", rules), nodes("b", rules)
    number = b.sealed(["a", "b"]).number
    store = nodes.store
    # The leader's key is gone and the report is there before anybody can have been elected.
    store.txn(
        (),
        (
            Delete("/autoglm/run%2F1/leader"),
            Put(
                f"/autoglm/run%2F1/broken/{number}/b",
                {"failure": failure("b", "unseen").to_json(), "alive_s": 1.0},
            ),
        ),
    )
    assert "unseen" in a.numbered(2).reason


def test_the_same_node_anew_is_a_new_incarnation(nodes: Nodes) -> None:
    a, b = nodes("a", policy(2, 2)), nodes("b", policy(2, 2))
    first = a.sealed(["a", "b"])
    again = nodes("b", policy(2, 2))
    assert "another agent took the node name" in b.lease_lost().reason
    second = again.numbered(2)
    assert second.placements[0].incarnation == first.placements[0].incarnation
    assert second.placements[1].incarnation > first.placements[1].incarnation
    a.numbered(2)


def test_the_c10d_address_of_a_generation_is_found_and_a_stale_one_refused(nodes: Nodes) -> None:
    a, b = nodes("a", policy(2, 2)), nodes("b", policy(2, 2))
    first = a.sealed(["a", "b"]).number
    a.session.publish_c10d(first, "127.0.0.1", 4711)
    assert b.session.wait_c10d(first, WAIT_S) == ("127.0.0.1", 4711)
    b.session.report_broken(first, failure("b"), 1.0)
    second = a.numbered(2)
    with pytest.raises(Superseded):
        a.session.publish_c10d(first, "127.0.0.1", 4712)
    b.numbered(2)
    with pytest.raises(Superseded):
        b.session.wait_finished(first, WAIT_S)
    a.session.report_entered(second.number)
    b.session.report_entered(second.number)
    b.session.wait_entered(second, WAIT_S)


class Unreliable:
    """A store whose calls can be made to fail; everything else is the store's."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.keep_alive_fails = False
        self.seals_without_answer = 0
        self.on_event: Callable[[WatchEvent], None] | None = None

    def lease_keep_alive(self, lease: int) -> float:
        if self.keep_alive_fails:
            raise StoreUnavailable("no answer", sent=True)
        return self._store.lease_keep_alive(lease)

    def txn(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Txn:
        done = self._store.txn(compares, operations)
        if self.seals_without_answer and any(each.key.endswith("/generation") for each in operations):
            self.seals_without_answer -= 1
            raise StoreUnavailable("no answer", sent=True)
        return done

    def watch(self, prefix: str, from_revision: int, on_event: Callable[[WatchEvent], None]) -> Watch:
        self.on_event = on_event
        return self._store.watch(prefix, from_revision, on_event)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_node_that_cannot_renew_fences_itself_while_its_lease_still_stands(nodes: Nodes) -> None:
    class Still:
        """Time does not pass in the store: nothing but the session itself can end the membership."""

        def monotonic(self) -> float:
            return 0.0

        def wall(self) -> float:
            return 0.0

    with closing(MemoryStore(Still())) as store:
        unreliable = Unreliable(store)
        a = nodes("a", policy(1, 1), store=unreliable, lease_s=0.4)
        a.sealed(["a"])
        unreliable.keep_alive_fails = True
        assert "could not be renewed for 0.3 s" in a.lease_lost().reason
        assert store.get("/autoglm/run%2F1/members/a") is not None
        assert not a.session.is_joined()
        with pytest.raises(NotJoined):
            a.session.wait_sealed(99, WAIT_S)
        unreliable.keep_alive_fails = False
        a.session.join()
        generation = a.numbered(2)
        assert generation.restart_count == 1
        assert generation.failures == 0, "a node that comes back is not charged for its former self"
        a.session.close()


def test_a_lease_that_ended_in_the_store_is_noticed(nodes: Nodes) -> None:
    a = nodes("a", policy(1, 1), lease_s=0.4)
    a.sealed(["a"])
    entry = nodes.store.get("/autoglm/run%2F1/members/a")
    assert entry is not None
    nodes.store.lease_revoke(entry.lease)
    assert "has ended in the store" in a.lease_lost().reason


def test_a_seal_without_an_answer_is_settled_by_reading(nodes: Nodes) -> None:
    unreliable = Unreliable(nodes.store)
    unreliable.seals_without_answer = 1
    a = nodes("a", policy(2, 2), store=unreliable)
    b = nodes("b", policy(2, 2))
    first = b.sealed(["a", "b"])
    b.session.report_broken(first.number, failure("b"), 1.0)
    second = b.sealed(["a", "b"])
    assert (first.number, second.number) == (1, 2)
    assert a.session.is_leader()


def test_a_lost_watch_is_repaired_by_reading(nodes: Nodes) -> None:
    unreliable = Unreliable(nodes.store)
    a = nodes("a", policy(1, 2), store=unreliable)
    a.sealed(["a"])
    assert unreliable.on_event is not None
    unreliable.on_event(WatchEvent(EventKind.DELETE, "/autoglm/run%2F1/", None, 1, lost=True))
    nodes("b", policy(1, 2)).sealed(["a", "b"])
    assert a.sealed(["a", "b"]).number == 2


def test_a_value_that_does_not_parse_harms_nobody(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    a = nodes("a", policy(1, 2))
    a.sealed(["a"])
    for key in ("members/evil", "broken/x/y", "c10d/one", "leader/x", "finished", "generations/z/z/z"):
        nodes.store.put(f"/autoglm/run%2F1/{key}", {"nproc": "many"})
    nodes("b", policy(1, 2))
    a.sealed(["a", "b"])
    assert "ignored /autoglm/run%2F1/members/evil" in caplog.text


MEMBER = """
import select, sys
from autoglm_elastic.agent.session import NodeSession
from autoglm_elastic.coordination import StoreClient
from autoglm_elastic.core.membership import Policy
port, node, lease_s = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
session = NodeSession(
    StoreClient("127.0.0.1", port), run_id="run/1", node=node, host="127.0.0.1", nproc=2, role="trainer",
    policy=Policy(1, 3, 3, 0.2, 30.0, 3600.0), lease_s=lease_s,
)
session.join()
print("joined", flush=True)
while True:
    select.select([session.events_fd], [], [])
    for event in session.take_events():
        print(type(event).__name__, flush=True)
"""


class MemberProcess:
    """A member of the run in a process of its own. Says "joined", then the names of its session's events."""

    def __init__(self, server: StoreServer, node: str, lease_s: float = 3600.0) -> None:
        arguments = [str(server.address[1]), node, str(lease_s)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", MEMBER, *arguments], stdout=subprocess.PIPE, text=True
        )
        self.wait_for("joined")

    def wait_for(self, word: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == word:
                return
        pytest.fail(f"the member ended without saying {word}")

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def server() -> Iterator[StoreServer]:
    server = StoreServer("127.0.0.1", 0)
    yield server
    server.close()


@pytest.fixture
def members(server: StoreServer) -> Iterator[Callable[..., MemberProcess]]:
    made: list[MemberProcess] = []

    def make(node: str, **options: float) -> MemberProcess:
        made.append(MemberProcess(server, node, **options))
        return made[-1]

    yield make
    for member in made:
        member.end()


@pytest.fixture
def client(server: StoreServer) -> Iterator[StoreClient]:
    client = StoreClient(*server.address, timeout_s=WAIT_S)
    yield client
    client.close()


def test_killed_agents_are_gone_at_once_and_a_killed_leader_too(
    nodes: Nodes, client: StoreClient, members: Callable[..., MemberProcess]
) -> None:
    """Their leases are an hour long: it is the closed connection that tells."""
    leader = members("leader")
    leader.wait_for("Sealed")
    other = members("other")
    leader.wait_for("Sealed")
    a = nodes("a", policy(1, 3), store=client)
    a.sealed(["leader", "other", "a"])
    other.send(signal.SIGKILL)
    second = a.sealed(["leader", "a"])
    assert not a.session.is_leader()
    client.put(Keys("run/1").entered(second.number, "leader"), {})  # else its loss were part of the first
    leader.send(signal.SIGKILL)
    assert a.sealed(["a"]).restart_count == 2
    assert a.session.is_leader()


def test_an_agent_that_was_stopped_is_replaced_and_fences_itself_when_it_wakes(
    nodes: Nodes, client: StoreClient, members: Callable[..., MemberProcess]
) -> None:
    a = nodes("a", policy(1, 3), store=client)
    stopped = members("stopped", lease_s=2.0)
    a.sealed(["a", "stopped"])
    stopped.send(signal.SIGSTOP)
    a.sealed(["a"])
    stopped.send(signal.SIGCONT)
    stopped.wait_for("LeaseLost")


def test_the_death_of_the_store_is_told_and_then_the_lease_is_lost(
    nodes: Nodes, server: StoreServer, client: StoreClient
) -> None:
    a = nodes("a", policy(1, 3), store=client, lease_s=1.0)
    client.on_connection = a.session.connection_changed
    a.sealed(["a"])
    server.close()
    a.wait_for(lambda event: isinstance(event, StoreLost))
    a.lease_lost()


def test_a_member_comes_back_to_a_store_that_began_anew(
    nodes: Nodes, server: StoreServer, client: StoreClient
) -> None:
    a = nodes("a", policy(1, 3), store=client, lease_s=1.0)
    client.on_connection = a.session.connection_changed
    a.sealed(["a"])
    server.close()
    second = StoreServer("127.0.0.1", server.address[1])
    a.wait_for(lambda event: isinstance(event, StoreBack))
    a.lease_lost()
    a.session.join()
    assert a.numbered(2).parent == -1
    a.session.close()
    client.close()
    second.close()
