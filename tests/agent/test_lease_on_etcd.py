"""A node's lease on etcd at its own timing: what costs a node its membership, and what does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from etcd_cluster import Cluster, needs_etcd

from autoglm_elastic.agent._lease import FENCE_FRACTION, LeaseKeeper
from autoglm_elastic.coordination import SystemClock
from autoglm_elastic.coordination.etcd import parse

pytestmark = needs_etcd

WAIT_S = 30.0
LEASE_S = 4.0
"""So long that a busy machine does not end it by chance."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "etcd", members=3, timing=()) as running:
        yield running


class Node:
    """A lease that is kept as a session keeps it."""

    def __init__(self, cluster: Cluster) -> None:
        from autoglm_elastic.coordination.etcd.store import EtcdStore

        self.store = EtcdStore(parse(cluster.address))
        self.reasons: list[str] = []
        self.lost = threading.Event()
        clock = SystemClock()

        def on_lost(reason: str) -> None:
            self.reasons.append(reason)
            self.lost.set()

        asked_at = clock.monotonic()
        self.lease = self.store.lease_grant(LEASE_S)
        self.store.put("/mine", 1, lease=self.lease)
        self._keeper = LeaseKeeper(
            self.store, self.lease, lease_s=LEASE_S, granted_at=asked_at, on_lost=on_lost, clock=clock
        )

    def close(self) -> None:
        self._keeper.stop()
        self.store.close()


@pytest.mark.long
def test_etcd_without_a_leader_costs_no_node_its_lease(cluster: Cluster) -> None:
    node = Node(cluster)
    leader = cluster.leader()
    other = (leader + 1) % 3
    cluster.kill(leader, other)
    assert not node.lost.wait(2 * LEASE_S), node.reasons
    cluster.start(leader, other)
    assert node.store.get("/mine") is not None
    assert node.reasons == []
    node.close()


def test_a_node_that_hears_nothing_of_etcd_gives_up_before_its_lease_can_end(cluster: Cluster) -> None:
    node = Node(cluster)
    for member in range(3):
        cluster.stop(member)
    assert node.lost.wait(WAIT_S)
    (reason,) = node.reasons
    assert reason.startswith(f"the lease could not be renewed for {FENCE_FRACTION * LEASE_S:g} s: etcd")
    for member in range(3):
        cluster.cont(member)
    node.close()
