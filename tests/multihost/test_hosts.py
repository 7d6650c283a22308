"""Hosts are lost, cut off, and stopped; members of etcd die. One world goes on, and there is one lineage.

Each test is one job that goes through several faults, because starting one takes longer than a recovery.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from etcd_cluster import needs_etcd
from net import needs_hosts
from scene import MEMBERS, NODES, scene, scene_with_hosted_store

pytestmark = [pytest.mark.multihost, pytest.mark.long, pytest.mark.timeout(400), needs_hosts, needs_etcd]


def others_than(*hosts: str) -> list[str]:
    return [name for name in (*NODES, *MEMBERS) if name not in hosts]


def test_any_host_is_lost_and_the_next_first_node_too(tmp_path: Path) -> None:
    with scene(tmp_path) as (here, etcd):
        last = here.generations()[-1]["nodes"][-1]
        here.lose(last)
        here.trains(2)
        here.recovered("a node lost", "goes on, no step lost; a new one takes its place")
        here.network.plug(last)
        here.start(last)
        here.trains(3)
        here.lose(here.first_node())
        here.trains(2)
        here.recovered("then the first node", "goes on, no step lost")
        leader = here.network[MEMBERS[0]].ask(etcd.leader)
        here.lose(here.first_node())
        etcd.kill(leader)
        here.trains(1)
        here.recovered("then the next first node and etcd's leader", "goes on, no step lost")
        here.end()


def test_a_host_that_is_cut_off_fences_itself_and_rejoins_after_healing(tmp_path: Path) -> None:
    with scene(tmp_path) as (here, etcd):
        network = here.network
        for what in ("first node alone", "last node alone", "nothing out", "nothing in", "with the minority"):
            host = here.generations()[-1]["nodes"][-1 if what.startswith("last") else 0]
            follower = next(
                name for number, name in enumerate(MEMBERS) if number != network[MEMBERS[0]].ask(etcd.leader)
            )
            here.fault()
            match what:
                case "nothing out":
                    network.cut_one_way([host], others_than(host))
                case "nothing in":
                    network.cut_one_way(others_than(host), [host])
                case "with the minority":
                    network.cut([host, follower], others_than(host, follower))
                case _:
                    network.isolate(host)
            here.trains(2, without=(host,))
            here.recovered(f"partition: {what}", "fences itself in time; rejoins when healed")
            here.fenced_before_the_others_went_on(host)
            network.heal()
            here.came_back(host)
        here.end()


def test_a_host_that_was_stopped_for_longer_than_its_lease_rejoins_and_confuses_nothing(
    tmp_path: Path,
) -> None:
    with scene(tmp_path) as (here, _):
        for who in ("first", "last"):
            host = here.generations()[-1]["nodes"][0 if who == "first" else -1]
            here.fault()
            here.network[host].stop()
            here.trains(2, without=(host,))
            here.recovered(f"all processes of the {who} node stopped", "goes on; it rejoins when continued")
            here.network[host].cont()
            here.came_back(host)
        here.end()


def test_on_a_store_that_an_agent_hosts_a_node_that_was_cut_off_rejoins_too(tmp_path: Path) -> None:
    with scene_with_hosted_store(tmp_path) as here:
        host = next(node for node in here.generations()[-1]["nodes"] if node != NODES[0])
        here.fault()
        here.network.isolate(host)
        here.trains(2, without=(host,))
        here.recovered("hosted store: a node alone", "fences itself in time; rejoins when healed")
        here.fenced_before_the_others_went_on(host)
        here.network.heal()
        here.came_back(host)
        here.end()
