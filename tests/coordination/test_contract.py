"""What every `ports.Store` must do. Each test runs over every adapter."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import pytest
from certificates import made
from etcd_cluster import Cluster, needs_etcd

from autoglm_elastic.coordination import (
    Credentials,
    LeaseGone,
    MemoryStore,
    StoreClient,
    StoreRefused,
    StoreServer,
    limits,
)
from autoglm_elastic.ports import (
    Compare,
    Delete,
    EventKind,
    Outcome,
    Put,
    Store,
    StoreUnavailable,
    WatchEvent,
)

WAIT_S = 20.0


class Subject:
    """The store under test. `compact(revision)`: lets it forget what was before."""

    def __init__(self, store: Store, compact: Callable[[int], None]) -> None:
        self.store = store
        self.compact = compact


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return made(tmp_path_factory.mktemp("tls"))


def hosted(name: str, credentials: Credentials) -> Iterator[Store]:
    if name == "memory":
        memory = MemoryStore()
        yield memory
        memory.close()
        return
    both = credentials if name == "tls" else None
    server = StoreServer("127.0.0.1", 0, credentials=both)
    client = StoreClient(*server.address, credentials=both)
    yield client
    client.close()
    server.close()


@pytest.fixture(params=["memory", "embedded", "tls", pytest.param("etcd", marks=needs_etcd)])
def subject(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, credentials: Credentials
) -> Iterator[Subject]:
    if request.param != "etcd":
        for store in hosted(request.param, credentials):
            yield Subject(store, lambda _: monkeypatch.setattr(limits, "HISTORY_EVENTS_MAX", 8))
        return
    from autoglm_elastic.coordination.etcd import parse
    from autoglm_elastic.coordination.etcd.store import EtcdStore

    running = request.getfixturevalue("cluster")
    running.ask(0, "kv/deleterange", {"key": "AA==", "range_end": "AA=="})
    etcd = EtcdStore(parse(running.address))
    yield Subject(etcd, lambda revision: running.ask(0, "kv/compaction", {"revision": revision}))
    etcd.close()


@pytest.fixture
def store(subject: Subject) -> Store:
    return subject.store


@pytest.fixture
def base(store: Store) -> int:
    """The store's revision before the test."""
    return store.txn((), ()).revision


class Seen:
    """Watch events in order, to be waited for."""

    def __init__(self) -> None:
        self.events: queue.Queue[WatchEvent] = queue.Queue()

    def __call__(self, event: WatchEvent) -> None:
        self.events.put(event)

    def next(self) -> WatchEvent:
        return self.events.get(timeout=WAIT_S)

    def keys(self, count: int) -> list[str]:
        return [self.next().key for _ in range(count)]


def test_a_key_that_was_never_written_is_none(store: Store) -> None:
    assert store.get("/a") is None


@pytest.mark.parametrize("value", [None, True, 7, -1.5, "ä", [], {"a": [1, {"b": None}]}])
def test_a_value_comes_back_as_it_was_put(store: Store, value: object) -> None:
    revision = store.put("/a", value)
    entry = store.get("/a")
    assert entry is not None
    assert (entry.key, entry.value, entry.mod_revision, entry.lease) == ("/a", value, revision, 0)


def test_a_store_is_not_touched_by_what_happens_to_the_object_later(store: Store) -> None:
    value = {"a": 1}
    store.put("/a", value)
    value["a"] = 2
    entry = store.get("/a")
    assert entry is not None
    assert entry.value == {"a": 1}


def test_revisions_grow_and_the_first_is_kept(store: Store) -> None:
    first, second = store.put("/a", 1), store.put("/a", 2)
    entry = store.get("/a")
    assert second > first
    assert entry is not None
    assert (entry.create_revision, entry.mod_revision) == (first, second)


def test_a_prefix_is_read_in_order_at_one_revision(store: Store) -> None:
    for key in ("/b/2", "/b/1", "/a", "/b", "/c"):
        store.put(key, key)
    entries, revision = store.get_prefix("/b/")
    assert [entry.key for entry in entries] == ["/b/1", "/b/2"]
    assert revision == store.put("/x", 0) - 1


def test_delete_says_whether_there_was_something(store: Store) -> None:
    store.put("/a", 1)
    assert store.delete("/a")
    assert not store.delete("/a")
    assert store.get("/a") is None


def test_a_transaction_is_done_when_all_compares_hold(store: Store) -> None:
    revision = store.put("/a", 1)
    done = store.txn([Compare("/a", revision), Compare("/b", 0)], [Put("/b", 2), Delete("/a")])
    assert done.outcome is Outcome.OK
    assert store.get("/a") is None
    entry = store.get("/b")
    assert entry is not None
    assert entry.mod_revision == done.revision


def test_a_transaction_with_one_compare_that_fails_does_nothing(store: Store) -> None:
    revision = store.put("/a", 1)
    done = store.txn([Compare("/a", revision), Compare("/a", 0)], [Put("/b", 2)])
    assert done.outcome is Outcome.CONFLICT
    assert {entry.key for entry in done.entries} == {"/a"}
    assert store.get("/b") is None
    assert done.revision == revision


def test_an_empty_transaction_tells_the_revision(store: Store) -> None:
    revision = store.put("/a", 1)
    assert store.txn((), ()).revision == revision


def test_of_many_that_compare_the_same_revision_one_wins(store: Store) -> None:
    outcomes: list[Outcome] = []
    ready = threading.Barrier(8)

    def compete(number: int) -> None:
        ready.wait(WAIT_S)
        outcomes.append(store.txn([Compare("/leader", 0)], [Put("/leader", number)]).outcome)

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(outcome.value for outcome in outcomes) == ["conflict"] * 7 + ["ok"]


@pytest.mark.parametrize(
    "refused",
    [
        lambda store: store.put("", 1),
        lambda store: store.put("/" + "k" * limits.KEY_BYTES_MAX, 1),
        lambda store: store.put("/a", object()),
        lambda store: store.put("/a", "v" * (limits.VALUE_BYTES_MAX + 1)),
        lambda store: store.txn((), [Put("/a", 1), Delete("/a")]),
        lambda store: store.txn([Compare("/a", 0)] * (limits.TXN_COMPARES_MAX + 1), ()),
        lambda store: store.lease_grant(0.0),
        lambda store: store.lease_grant(1e9),
    ],
)
def test_what_breaks_a_limit_is_refused_and_harms_nothing(
    store: Store, base: int, refused: Callable[[Store], object]
) -> None:
    with pytest.raises(StoreRefused):
        refused(store)
    assert store.txn((), ()).revision == base
    store.put("/a", 1)


@pytest.mark.parametrize("name", ["memory", "embedded"])
def test_a_full_store_refuses_and_has_room_again_after_a_delete(
    name: str, credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """etcd has a quota of its own, and clears only by compaction."""
    monkeypatch.setattr(limits, "STORED_BYTES_MAX", 10)
    for store in hosted(name, credentials):
        fill(store)


def fill(store: Store) -> None:
    store.put("/a", "12345")
    with pytest.raises(StoreRefused):
        store.put("/b", "12345")
    store.delete("/a")
    store.put("/b", "12345")


def test_keys_end_with_their_lease(store: Store, base: int) -> None:
    seen = Seen()
    store.watch("/", base + 1, seen)
    lease = store.lease_grant(0.2)
    store.put("/mine/1", 1, lease=lease)
    store.put("/mine/2", 2, lease=lease)
    store.put("/kept", 3)
    assert seen.keys(3) == ["/mine/1", "/mine/2", "/kept"]
    ended = [seen.next(), seen.next()]
    assert [(event.kind, event.key, event.value) for event in ended] == [
        (EventKind.DELETE, "/mine/1", None),
        (EventKind.DELETE, "/mine/2", None),
    ]
    assert store.get_prefix("/mine/")[0] == []
    assert store.get("/kept") is not None
    assert store.lease_keep_alive(lease) == 0.0
    with pytest.raises(LeaseGone):
        store.put("/mine/3", 1, lease=lease)


def test_a_lease_that_is_kept_alive_outlives_one_that_is_not(store: Store) -> None:
    seen = Seen()
    kept, left = store.lease_grant(5.0), store.lease_grant(0.2)
    store.put("/kept", 1, lease=kept)
    store.put("/left", 1, lease=left)
    assert store.lease_keep_alive(kept) == 5.0
    store.watch("/", store.txn((), ()).revision + 1, seen)
    assert seen.next().key == "/left"
    assert store.get("/kept") is not None


def test_a_revoked_lease_ends_at_once_and_only_what_it_owns_last(store: Store) -> None:
    lease = store.lease_grant(60.0)
    store.put("/mine", 1, lease=lease)
    store.put("/was-mine", 1, lease=lease)
    store.put("/was-mine", 2)
    store.lease_revoke(lease)
    store.lease_revoke(lease)
    assert store.get("/mine") is None
    assert store.get("/was-mine") is not None


def test_a_watch_sees_each_change_of_its_prefix_once_in_order(store: Store, base: int) -> None:
    seen = Seen()
    store.watch("/w/", base + 1, seen)
    store.put("/w/a", 1)
    store.put("/other", 1)
    store.txn((), [Put("/w/b", 2), Put("/w/c", 3)])
    store.delete("/w/a")
    events = [seen.next() for _ in range(4)]
    assert [(event.kind.value, event.key, event.value) for event in events] == [
        ("put", "/w/a", 1),
        ("put", "/w/b", 2),
        ("put", "/w/c", 3),
        ("delete", "/w/a", None),
    ]
    assert [event.revision - base for event in events] == [1, 3, 3, 4]


def test_a_watch_starts_in_the_past_or_in_the_future(store: Store) -> None:
    first = store.put("/a", 1)
    past, future = Seen(), Seen()
    store.watch("/", first, past)
    store.watch("/", first + 2, future)
    store.put("/b", 2)
    store.put("/c", 3)
    assert past.keys(3) == ["/a", "/b", "/c"]
    assert future.next().key == "/c"


def test_a_watch_too_far_behind_is_lost_and_goes_on(subject: Subject, base: int) -> None:
    store = subject.store
    subject.compact(base)
    for number in range(20):
        store.put("/a", number)
    subject.compact(base + 20)
    seen = Seen()
    store.watch("/", max(1, base), seen)
    event = seen.next()
    assert event.lost
    assert event.revision == base + 20
    store.put("/b", 1)
    event = seen.next()
    assert (event.key, event.lost) == ("/b", False)


def test_no_callback_begins_after_cancel(store: Store, base: int) -> None:
    cancelled, other = Seen(), Seen()
    watch = store.watch("/", base + 1, cancelled)
    store.watch("/", base + 1, other)
    store.put("/a", 1)
    assert cancelled.next().key == "/a"
    watch.cancel()
    watch.cancel()
    store.put("/b", 1)
    assert other.keys(2) == ["/a", "/b"]
    assert cancelled.events.empty()


def test_a_closed_store_is_unavailable(store: Store) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreUnavailable) as caught:
        store.get("/a")
    assert not caught.value.sent
