"""Requests to a real etcd in one recovery, by number of nodes: a few, and one a node."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from etcd_cluster import Cluster, needs_etcd

from autoglm_elastic.agent.session import NodeSession
from autoglm_elastic.coordination.etcd import parse
from autoglm_elastic.core.membership import Failure, Policy

pytestmark = needs_etcd

WAIT_S = 30.0


def recovery(cluster: Cluster, nodes: int) -> Counter[str]:
    """Requests of all nodes from a worker's death until every node has entered the next generation, without the
    renewals of leases, which time alone asks for."""
    from autoglm_elastic.coordination.etcd.store import EtcdStore

    target = parse(cluster.address)
    with ExitStack() as stack:
        stores = [stack.enter_context(closing(EtcdStore(target))) for _ in range(nodes)]
        sessions = [
            NodeSession(
                store,
                run_id=f"job{nodes}",
                node=f"n{index}",
                host="127.0.0.1",
                nproc=1,
                role="default",
                policy=Policy(nodes, nodes, 3, 1.0, WAIT_S, 30.0),
                lease_s=5.0,
            )
            for index, store in enumerate(stores)
        ]
        for session in sessions:
            stack.enter_context(closing(session))
            session.join()
        enter(sessions, 1)
        before = total(stores)
        victim = sessions[nodes // 2]
        victim.report_broken(1, Failure(victim.node, 0, nodes // 2, -9, "", -1, 0.0), alive_s=1.0)
        enter(sessions, 2)
        return total(stores) - before


def enter(sessions: list[NodeSession], number: int) -> None:
    """As the agents do."""
    generation = sessions[0].wait_sealed(number - 1, WAIT_S)
    for session in sessions[1:]:
        session.wait_sealed(number - 1, WAIT_S)
    by_node = {session.node: session for session in sessions}
    by_node[generation.placements[0].node].publish_c10d(number, "127.0.0.1", 1)
    for session in sessions:
        session.wait_c10d(number, WAIT_S)
        session.report_entered(number)
    for session in sessions:
        session.wait_entered(generation, WAIT_S)


def total(stores: list) -> Counter[str]:  # type: ignore[type-arg]
    counts: Counter[str] = Counter()
    for store in stores:
        counts.update({name: n for name, n in store.operations.items() if name.startswith("KV.")})
    return counts


def test_a_recovery_costs_a_request_a_node_and_a_few(tmp_path: Path) -> None:
    with Cluster(tmp_path / "etcd") as cluster:
        found = {nodes: recovery(cluster, nodes).total() for nodes in (2, 6, 12)}
    slopes = [(found[6] - found[2]) / 4, (found[12] - found[6]) / 6]
    assert slopes == [pytest.approx(1.0), pytest.approx(1.0)], found
    assert found[2] <= 6, found
