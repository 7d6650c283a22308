"""The etcd store where etcd itself is in trouble: members killed and stopped, all of it gone and back."""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from etcd_cluster import Cluster, needs_etcd

from autoglm_elastic.coordination import StoreRefused
from autoglm_elastic.coordination.etcd import parse
from autoglm_elastic.coordination.etcd import store as store_module
from autoglm_elastic.coordination.etcd.store import EtcdStore
from autoglm_elastic.ports import Compare, Outcome, Put, StoreUnavailable, WatchEvent

pytestmark = needs_etcd

WAIT_S = 30.0
LEASE_S = 5.0
"""Longer than an election and an attempt at a stopped member, on a busy machine."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("etcd"), members=3) as running:
        yield running


@pytest.fixture
def three(shared: Cluster) -> Iterator[Cluster]:
    """Three members, whole again after the test."""
    yield shared
    dead = [member for member, process in enumerate(shared.processes) if process is None]
    for member in {0, 1, 2} - set(dead):
        shared.cont(member)
    shared.start(*dead)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "etcd") as running:
        yield running


class Life:
    """A client that writes 1, 2, 3 … under one key, watches it, and keeps a lease, whatever happens to etcd."""

    def __init__(self, address: str, lease_s: float = LEASE_S) -> None:
        self.store = EtcdStore(parse(address))
        self.store.delete("/life/count")
        self.seen: list[WatchEvent] = []
        self.error: BaseException | None = None
        self._changed = threading.Condition()
        self._over = threading.Event()
        self.lease = self.store.lease_grant(lease_s)
        self.store.put("/life/lease", "mine", lease=self.lease)
        self.store.watch("/life/count", self.store.txn((), ()).revision + 1, self._see)
        self._threads = [threading.Thread(target=each) for each in (self._write, self._renew)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(WAIT_S)
        self.store.close()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.error or len(self.seen) >= count, WAIT_S), len(
                self.seen
            )
        if self.error:
            raise self.error

    def pause(self, seconds: float) -> None:
        self._over.wait(seconds)

    def _see(self, event: WatchEvent) -> None:
        with self._changed:
            self.seen.append(event)
            self._changed.notify_all()

    def _write(self) -> None:
        try:
            while not self._over.is_set():
                self._write_next()
        except BaseException as error:
            self._fail(error)

    def _write_next(self) -> None:
        """The next number, exactly once: what became of an attempt is read, never assumed."""
        try:
            present = self.store.get("/life/count")
            number, revision = (0, 0) if present is None else (present.value, present.mod_revision)
            done = self.store.txn([Compare("/life/count", revision)], [Put("/life/count", number + 1)])
        except StoreUnavailable:
            return
        assert done.outcome is Outcome.OK, "nobody else writes here"

    def _renew(self) -> None:
        try:
            while not self._over.wait(0.3):
                try:
                    assert self.store.lease_keep_alive(self.lease) > 0, "the lease has ended"
                except StoreUnavailable:
                    continue
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.error = error
            self._changed.notify_all()

    def check(self) -> None:
        assert [event.value for event in self.seen] == list(range(1, len(self.seen) + 1)), (
            "each once, in order"
        )
        assert not any(event.lost for event in self.seen)
        entry = self.store.get("/life/lease")
        assert entry is not None
        assert entry.lease == self.lease


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("who", ["leader", "follower"])
def test_a_member_is_lost_and_nobody_notices(three: Cluster, how: str, who: str) -> None:
    leader = three.leader()
    victim = leader if who == "leader" else (leader + 1) % 3
    # The victim is the member that the client talks to.
    ports = [three.clients[victim], *(port for port in three.clients if port != three.clients[victim])]
    with Life("etcd://" + ",".join(f"127.0.0.1:{port}" for port in ports)) as life:
        life.wait_for(10)
        (three.kill if how == "killed" else three.stop)(victim)
        life.wait_for(len(life.seen) + 50)
        if how == "killed":
            three.start(victim)
        else:
            three.cont(victim)
        life.wait_for(len(life.seen) + 20)
        life.check()


@pytest.mark.long
def test_a_lease_outlives_the_loss_of_all_members_and_a_watch_goes_on(three: Cluster) -> None:
    connection: queue.Queue[bool] = queue.Queue()
    with Life(three.address, lease_s=2.0) as life:
        life.store.on_connection = connection.put
        life.wait_for(10)
        three.kill(0, 1, 2)
        assert connection.get(timeout=WAIT_S) is False
        for _ in range(12):  # for longer than the lease
            assert life.store.lease_keep_alive(life.lease) == 2.0
            life.pause(0.3)
        with pytest.raises(StoreUnavailable) as caught:
            life.store.get("/life/count")
        assert not caught.value.sent
        three.start(0, 1, 2)
        assert connection.get(timeout=WAIT_S) is True
        life.wait_for(len(life.seen) + 20)
        life.check()


def test_nothing_spins_while_etcd_is_gone(one: Cluster) -> None:
    store = EtcdStore(parse(one.address), timeout_s=2.0)
    for prefix in ("/a/", "/b/", "/c/"):
        store.watch(prefix, 1, lambda _: None)
    one.kill(0)
    before = time.process_time()
    with pytest.raises(StoreUnavailable):
        store.get("/a/1")  # two seconds of attempts
    assert time.process_time() - before < 1.0
    store.close()


@pytest.mark.long
def test_a_member_that_says_nothing_is_no_reason_to_trust_a_lease(one: Cluster) -> None:
    store = EtcdStore(parse(one.address))
    lease = store.lease_grant(LEASE_S)
    one.stop(0)
    with pytest.raises(StoreUnavailable):
        store.lease_keep_alive(lease)
    one.cont(0)
    assert store.lease_keep_alive(lease) == LEASE_S
    store.close()


def test_members_that_are_not_all_known_prove_nothing(three: Cluster) -> None:
    store = EtcdStore(parse(f"etcd://127.0.0.1:{three.clients[0]}"))
    lease = store.lease_grant(LEASE_S)
    three.kill(0)
    with pytest.raises(StoreUnavailable):
        store.lease_keep_alive(lease)
    store.close()


def test_a_member_that_was_down_when_we_came_is_known_by_what_it_advertises(three: Cluster) -> None:
    three.kill(0)
    store = EtcdStore(parse(three.address))
    lease = store.lease_grant(LEASE_S)
    three.kill(1, 2)
    assert store.lease_keep_alive(lease) == LEASE_S
    store.close()


@pytest.mark.long
def test_what_a_stopped_member_was_told_is_unknown_and_what_it_was_not_told_is_not(one: Cluster) -> None:
    store = EtcdStore(parse(one.address), timeout_s=3.0)
    store.put("/a", 1)
    one.stop(0)
    with pytest.raises(StoreUnavailable) as told:
        store.put("/a", 2)
    with pytest.raises(StoreUnavailable) as untold:
        store.put("/a", 3)
    assert (told.value.sent, untold.value.sent) == (True, False)
    one.cont(0)
    entry = store.get("/a")
    assert entry is not None
    assert entry.value in (1, 2)
    store.close()


def test_a_watch_that_resumes_after_a_compaction_says_so(one: Cluster) -> None:
    events: queue.Queue[WatchEvent] = queue.Queue()
    store, other = EtcdStore(parse(one.address)), EtcdStore(parse(one.address))
    store.watch("/", store.put("/a", 1), events.put)
    assert events.get(timeout=WAIT_S).value == 1
    for number in range(5):
        revision = other.put("/a", number)
        events.get(timeout=WAIT_S)
    one.kill(0)
    one.start(0)
    # The stream resumes after the last event it handed over: nothing is lost.
    other.put("/b", 1)
    assert events.get(timeout=WAIT_S).key == "/b"
    one.kill(0)
    one.start(0)
    revision = other.put("/c", 1)
    assert events.get(timeout=WAIT_S).key == "/c"
    one.ask(0, "kv/compaction", {"revision": revision})
    store.watch("/", 1, events.put)
    assert events.get(timeout=WAIT_S).lost
    store.close()
    other.close()


def test_etcd_that_begins_anew_is_noticed(one: Cluster, tmp_path: Path) -> None:
    events: queue.Queue[WatchEvent] = queue.Queue()
    store = EtcdStore(parse(one.address))
    lease = store.lease_grant(LEASE_S)
    for number in range(5):
        store.put("/a", number)
    store.watch("/", 2, events.put)
    assert [events.get(timeout=WAIT_S).value for _ in range(5)] == list(range(5))
    one.kill(0)
    shutil.rmtree(tmp_path / "etcd")
    one.start(0)
    assert events.get(timeout=WAIT_S).lost
    assert store.lease_keep_alive(lease) == 0.0
    store.put("/b", 1)
    assert events.get(timeout=WAIT_S).key == "/b"
    store.close()


def test_what_a_job_leaves_ends_with_the_jobs_own_lease(one: Cluster) -> None:
    job, other = EtcdStore(parse(one.address), prefix="/1"), EtcdStore(parse(one.address), prefix="/2")
    mine = job.lease_grant(60)
    job.put("/1", 1)
    job.put("/1/mine", 1, lease=mine)
    other.put("/2", 1)
    entry = job.get("/1")
    assert entry is not None
    assert entry.lease == 0, "the job's lease is nobody's business"
    leases = {int(lease["ID"]) for lease in one.ask(0, "lease/leases", {})["leases"]}
    assert len(leases) == 3
    keyed = one.ask(0, "kv/range", {"key": "LzE="})["kvs"][0]  # "/1"
    one.ask(0, "lease/revoke", {"ID": keyed["lease"]})  # as if nobody had renewed it for an hour
    assert job.get("/1") is None
    assert job.get("/1/mine") is not None
    assert job.get("/2") is not None
    job.put("/1", 2)  # it is granted again
    assert job.get("/1") is not None
    job.close()
    other.close()


def test_a_large_prefix_is_read_in_pages_at_one_revision(
    one: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PAGE_KEYS", 7)
    store = EtcdStore(parse(one.address))
    for number in range(30):
        store.put(f"/p/{number:02}", number)
    before = store.operations["KV.Range"]
    entries, revision = store.get_prefix("/p/")
    assert [entry.value for entry in entries] == list(range(30))
    assert revision == store.txn((), ()).revision
    assert store.operations["KV.Range"] - before == 5
    store.close()


def test_what_etcd_has_no_room_for_is_refused(one: Cluster) -> None:
    store = EtcdStore(parse(one.address))
    with pytest.raises(StoreRefused, match="larger than max"):
        store.put("/a", "v" * (2 << 20))  # etcd takes 1.5 MiB unless told otherwise
    with pytest.raises(StoreRefused, match="too many operations"):
        store.txn((), [Put(f"/{number}", 1) for number in range(200)])
    assert store.get("/a") is None
    store.close()


def test_nobody_there_is_one_clear_error(one: Cluster) -> None:
    address = one.address
    one.kill(0)
    with pytest.raises(StoreUnavailable, match=r"etcd at 127\.0\.0\.1:\d+ does not answer: .*refused"):
        EtcdStore(parse(address), timeout_s=0.5)
