"""The hosts themselves: names, addresses, cuts, and that nothing of them stays."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from net import ETC, NETNS, Network, needs_hosts, sweep
from wire import needs_wires

pytestmark = [pytest.mark.multihost, needs_hosts]

WAIT_S = 1.0
"""Long enough for an answer on this switch, and what a test waits for one that does not come."""


def serve(network: Network, host: str) -> socket.socket:
    return network[host].ask(lambda: socket.create_server((network[host].address, 7000)))


def reaches(network: Network, one: str, other: str) -> bool:
    def connect() -> bool:
        try:
            socket.create_connection((network[other].address, 7000), timeout=WAIT_S).close()
        except OSError:
            return False
        return True

    return network[one].ask(connect)


@pytest.mark.long
def test_hosts_have_names_and_addresses_and_links_that_can_be_cut(tmp_path: Path) -> None:
    with Network(tmp_path, "a", "b", "c") as network, serve(network, "a"), serve(network, "b"):
        told = subprocess.run(
            [*network["a"].prefix, sys.executable, "-c",
             "import socket; print(socket.gethostname(), socket.gethostbyname('b'))"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert told.stdout.split() == ["a", network["b"].address]
        assert reaches(network, "a", "b")
        network.isolate("a")
        assert not reaches(network, "a", "b")
        assert not reaches(network, "c", "a")
        assert reaches(network, "c", "b")
        network.heal()
        network.cut_one_way(["a"], ["c"])
        assert not reaches(network, "c", "a"), "the answer does not come back"
        assert reaches(network, "b", "a")
        network.heal()
        network.unplug("a")
        assert not reaches(network, "c", "a")
        network.plug("a")
        assert any(reaches(network, "c", "a") for _ in range(20)), (
            "who was not found is looked for again after a while"
        )


@needs_wires
def test_a_wire_delays_and_loses(tmp_path: Path) -> None:
    with Network(tmp_path, "a", "b", wired=("b",)) as network, serve(network, "b"):
        assert reaches(network, "a", "b")
        wire = network.wires["b"]
        wire.delay_s = WAIT_S / 4
        began = time.monotonic()
        assert reaches(network, "a", "b")
        assert time.monotonic() - began >= WAIT_S / 2, "there and back"
        wire.lost = 1.0
        assert not reaches(network, "a", "b")
        network.narrow("b", 10)


def test_everything_on_a_host_is_stopped_and_killed(tmp_path: Path) -> None:
    parent = "import os; os.fork(); os.setpgid(0, 0); os.write(1, b'x'); os.read(0, 1)"
    with Network(tmp_path, "a") as network:
        command = [*network["a"].prefix, sys.executable, "-c", parent]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.read(2) == b"xx"
            network["a"].stop()
            assert [found.status() for found in network["a"].processes()] == ["stopped", "stopped"]
            network["a"].kill()
            assert process.wait(10) == -9
        assert network["a"].processes() == []


def fail_with_a_process_on_a_host(folder: Path) -> None:
    with Network(folder, "a") as network:
        STARTED.append(subprocess.Popen([*network["a"].prefix, "sleep", "600"]))
        raise ZeroDivisionError


STARTED: list[subprocess.Popen[bytes]] = []


def test_nothing_stays_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_with_a_process_on_a_host(tmp_path)
    (process,) = STARTED
    assert process.wait(10) == -9
    assert not list(NETNS.glob(f"agmh-{os.getpid()}-*"))
    assert not list(ETC.glob(f"agmh-{os.getpid()}-*"))


def test_what_a_dead_test_process_left_behind_is_cleared_away_and_only_that(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(30)
    with Network(tmp_path, "a") as alive:
        left = f"agmh-{dead.pid}-x"
        subprocess.run(["ip", "netns", "add", left], check=True)
        sweep()
        assert not (NETNS / left).exists()
        assert (NETNS / alive["a"].namespace).exists()
