"""Hosts are lost, cut off, and stopped; members of etcd die. One world goes on, and there is one lineage."""

from __future__ import annotations

from pathlib import Path

import pytest
from etcd_cluster import needs_etcd
from net import needs_hosts
from scene import MEMBERS, NODES, scene

pytestmark = [pytest.mark.multihost, pytest.mark.timeout(300), needs_hosts, needs_etcd]


def others_than(host: str) -> list[str]:
    return [name for name in NODES if name != host]


def test_the_first_node_is_lost_and_then_the_next_first_node(tmp_path: Path) -> None:
    with scene(tmp_path) as here:
        for world in (2, 1):
            host = here.first_node()
            here.lose(host)
            here.trains(world)
            here.recovered(f"first node lost ({world + 1} nodes)", "goes on, no step lost")
        here.end()


def test_a_node_that_is_not_the_first_is_lost_and_another_takes_its_place(tmp_path: Path) -> None:
    with scene(tmp_path) as here:
        last = here.generations()[-1]["nodes"][-1]
        here.lose(last)
        here.trains(2)
        here.recovered("node lost", "goes on, no step lost")
        here.network.plug(last)
        here.start(last)
        here.trains(3)
        here.end()


@pytest.mark.parametrize("who", ["first", "last"])
def test_a_partitioned_host_fences_itself_and_rejoins_after_healing(who: str, tmp_path: Path) -> None:
    with scene(tmp_path) as here:
        host = here.generations()[-1]["nodes"][0 if who == "first" else -1]
        here.fault()
        here.network.isolate(host)
        here.trains(2, without=(host,))
        here.recovered(f"partition: the {who} node alone", "fences itself, rejoins")
        here.fenced_before_the_others_went_on(host)
        here.network.heal()
        here.trains(3, more=20)
        assert here.events("node.joined", node=host)
        here.end()


@pytest.mark.parametrize("way", ["out", "in"])
def test_a_host_that_can_only_hear_or_only_be_heard_fences_itself_and_rejoins(
    way: str, tmp_path: Path
) -> None:
    with scene(tmp_path) as here:
        host = here.first_node()
        rest = [*others_than(host), *MEMBERS]
        here.fault()
        if way == "out":
            here.network.cut_one_way([host], rest)
        else:
            here.network.cut_one_way(rest, [host])
        here.trains(2, without=(host,))
        here.recovered(f"one-way partition: nothing {way}", "fences itself, rejoins")
        here.fenced_before_the_others_went_on(host)
        here.network.heal()
        here.trains(3, more=20)
        here.end()


def test_a_host_that_was_stopped_for_longer_than_its_lease_rejoins_and_confuses_nothing(
    tmp_path: Path,
) -> None:
    with scene(tmp_path) as here:
        host = here.first_node()
        here.fault()
        here.network[host].stop()
        here.trains(2, without=(host,))
        here.recovered("all processes of the first node stopped", "goes on; rejoins when continued")
        here.network[host].cont()
        here.trains(3, more=20)
        here.end()


def test_the_leader_of_etcd_dies_while_a_lost_node_is_being_replaced(tmp_path: Path) -> None:
    with scene(tmp_path) as here:
        leader = here.network[MEMBERS[0]].ask(here.etcd.leader)
        here.lose(here.first_node())
        here.etcd.kill(leader)
        here.trains(2)
        here.recovered("first node and etcd's leader lost at once", "goes on, no step lost")
        here.end()


def test_a_host_on_the_side_of_etcds_minority_stops_and_the_majority_goes_on(tmp_path: Path) -> None:
    with scene(tmp_path) as here:
        host = here.first_node()
        minority = next(
            name for number, name in enumerate(MEMBERS) if number != here.network["e1"].ask(here.etcd.leader)
        )
        here.fault()
        here.network.cut([host, minority], [*others_than(host), *(m for m in MEMBERS if m != minority)])
        here.trains(2, without=(host,))
        here.recovered("partition: first node with etcd's minority", "fences itself, rejoins")
        here.fenced_before_the_others_went_on(host)
        here.network.heal()
        here.trains(3, more=20)
        here.end()
