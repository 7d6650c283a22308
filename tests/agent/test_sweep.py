"""What a run leaves in a store that outlives it, and who may clear it away; its address as torchrun gives it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters

from autoglm_elastic.agent._etcd_options import endpoint_of
from autoglm_elastic.agent._keys import Keys
from autoglm_elastic.agent._sweep import BATCH_MAX, sweep
from autoglm_elastic.coordination import MemoryStore
from autoglm_elastic.errors import UsageError
from autoglm_elastic.ports import Compare, Delete, Put, Txn

KEYS = Keys("run")


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    memory = MemoryStore()
    memory.put(KEYS.generation, {"number": 3})
    memory.put(KEYS.closed, {"outcome": "done"})
    for number in range(2 * BATCH_MAX):
        memory.put(KEYS.entered(3, f"node{number}"), {})
    memory.put(Keys("run2").closed, {"outcome": "done"})
    yield memory
    memory.close()


def left(store: MemoryStore) -> int:
    return len(store.get_prefix(KEYS.prefix)[0])


def test_a_run_without_members_is_cleared_away_and_no_other_is(store: MemoryStore) -> None:
    assert sweep(store, KEYS)
    assert [entry.key for entry in store.get_prefix("/")[0]] == [Keys("run2").closed]
    assert sweep(store, KEYS), "there is nothing to do"


@pytest.mark.parametrize("alive", [KEYS.member("a"), KEYS.leader])
def test_a_run_with_a_member_is_let_be(store: MemoryStore, alive: str) -> None:
    store.put(alive, {})
    before = left(store)
    assert not sweep(store, KEYS)
    assert left(store) == before


class BegunMeanwhile(MemoryStore):
    """A new attempt of the run has a leader before the second batch is deleted."""

    deletions = 0

    def txn(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Txn:
        if operations and isinstance(operations[0], Delete):
            self.deletions += 1
            if self.deletions == 2:
                super().txn((), [Put(KEYS.member("new"), {}), Put(KEYS.leader, {})])
        return super().txn(compares, operations)


def test_nothing_of_a_new_attempt_is_deleted() -> None:
    store = BegunMeanwhile()
    for number in range(2 * BATCH_MAX):
        store.put(KEYS.entered(3, f"node{number}"), {})
    assert not sweep(store, KEYS)
    assert left(store) == BATCH_MAX + 2
    store.close()


def params(endpoint: str, **config: str) -> RendezvousParameters:
    return RendezvousParameters("autoglm-etcd", endpoint, "run", 1, 1, **config)


def test_endpoint_and_options_of_torchrun_make_one_address() -> None:
    assert endpoint_of(params("a:1,b:2"), is_etcd=True) == "etcd://a:1,b:2"
    with_files = params("a:1", ca="/c a", lease_s="5")
    assert endpoint_of(with_files, is_etcd=True) == "etcd://a:1?ca=%2Fc+a"
    assert endpoint_of(params("etcd://a:1?ca=c", user="me"), is_etcd=False) == "etcd://a:1?ca=c&user=me"
    assert endpoint_of(params("a:1"), is_etcd=False) == "a:1"
    named = params("etcd://a:1?ca=c&server_name=s", ca="other", server_name="other", cert="x", key="y")
    assert endpoint_of(named, is_etcd=False) == "etcd://a:1?ca=c&server_name=s&cert=x&key=y", (
        "the address first"
    )
    with pytest.raises(UsageError, match="a certificate without its key"):
        endpoint_of(params("a:1", cert="c"), is_etcd=True)
