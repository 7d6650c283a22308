"""The rendezvous handler by itself, and under stock torchrun with real kills."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from etcd_cluster import Cluster, needs_etcd
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from autoglm_elastic.agent.rendezvous import AutoglmRendezvousHandler
from autoglm_elastic.agent.session import Superseded
from autoglm_elastic.core.membership import Failure
from autoglm_elastic.errors import PlatformError, UsageError

WAIT_S = 60.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Handlers:
    """Makes handlers of one run and shuts them down, the store's host last."""

    def __init__(self) -> None:
        self.made: list[AutoglmRendezvousHandler] = []

    def __call__(self, nodes: str = "2:2", endpoint: str = "", **config: Any) -> AutoglmRendezvousHandler:
        if not endpoint:
            endpoint = self.made[0].endpoint if self.made else "localhost:0"
        least, most = map(int, nodes.split(":"))
        # A lease so long that a busy machine cannot end it by chance.
        settings = {"join_window_s": 0.2, "timeout": WAIT_S, "lease_s": 600.0}
        settings |= {"node": f"node{len(self.made)}"} | config
        params = RendezvousParameters("autoglm", endpoint, "job", least, most, **settings)
        handler = get_rendezvous_handler(params)
        assert isinstance(handler, AutoglmRendezvousHandler)
        self.made.append(handler)
        return handler

    def close(self) -> None:
        for handler in reversed(self.made):
            handler.shutdown()


@pytest.fixture
def handlers() -> Iterator[Handlers]:
    made = Handlers()
    yield made
    made.close()


def meet(*handlers: AutoglmRendezvousHandler) -> list[RendezvousInfo]:
    """`next_rendezvous` of all at the same time."""
    found: dict[int, RendezvousInfo] = {}

    def enter(index: int) -> None:
        found[index] = handlers[index].next_rendezvous()

    threads = [threading.Thread(target=enter, args=(index,)) for index in range(len(handlers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return [found[index] for index in range(len(handlers))]


def test_two_nodes_meet_and_share_a_store(handlers: Handlers) -> None:
    a, b = handlers(), handlers()
    assert (a.hosts_store, b.hosts_store) == (True, False)
    assert a.endpoint == b.endpoint
    first, second = meet(a, b)
    assert {first.rank, second.rank} == {0, 1}
    assert first.world_size == second.world_size == 2
    first.store.set("key", "value")
    assert second.store.get("key") == b"value"
    assert first.bootstrap_store_info == second.bootstrap_store_info
    assert a.use_agent_store
    assert (a.num_nodes_waiting(), b.num_nodes_waiting()) == (0, 0)
    assert not a.is_closed()


def test_after_a_failure_the_next_generation_has_a_store_without_a_past(handlers: Handlers) -> None:
    a, b = handlers(), handlers()
    first, _ = meet(a, b)
    first.store.set("key", "of the first generation")
    second, other = meet(a, b)
    assert a.current is not None
    assert a.current.number == 2
    assert not second.store.check(["key"])
    assert not other.store.check(["key"])
    assert first.bootstrap_store_info is not None
    assert second.bootstrap_store_info is not None
    assert first.bootstrap_store_info.master_port != second.bootstrap_store_info.master_port


def test_a_newcomer_shows_as_waiting_and_is_let_in(handlers: Handlers) -> None:
    a, b = handlers("1:3"), handlers("1:3")
    meet(a, b)
    c = handlers("1:2", first_generation=1)
    entered: list[RendezvousInfo] = []
    newcomer = threading.Thread(target=lambda: entered.append(c.next_rendezvous()))
    newcomer.start()
    for handler in (a, b):  # an agent that has not seen the newcomer yet comes because of a failure
        handler.session.wait_sealed(1, WAIT_S)
        assert handler.num_nodes_waiting() == 1
    infos = meet(a, b)
    newcomer.join(WAIT_S)
    assert [info.world_size for info in [*infos, *entered]] == [3, 3, 3]
    assert a.current is not None
    assert a.current.restart_count == 0


def test_one_node_too_many_does_not_disturb_the_others(handlers: Handlers) -> None:
    a, b = handlers("1:1"), handlers("1:1", timeout=1.0)
    a.next_rendezvous()
    with pytest.raises(RendezvousTimeoutError, match="no generation after 1 was sealed"):
        b.next_rendezvous()
    assert a.num_nodes_waiting() == 0


def test_our_agent_enters_generations_itself(handlers: Handlers) -> None:
    a, b = handlers(nproc=2, role="trainer"), handlers(nproc=1, role="trainer")
    a.session.join()
    b.session.join()
    generation = a.session.wait_sealed(0, WAIT_S)
    assert generation.world_size == 3
    first, host, port = a.enter(generation)
    second, *address = b.enter(generation)
    assert address == [host, port]
    b.session.report_broken(1, Failure("node1", 0, 2, -9, "killed", -1, 0.0), 1.0)
    newer = a.session.wait_sealed(1, WAIT_S)
    # The old generation's store serves on until the new one is in use.
    a.enter(newer)
    b.enter(newer)
    second.set("key", "value")
    assert first.get("key") == b"value"
    a.settle()
    b.settle()
    with pytest.raises(Superseded):
        a.enter(generation)


def test_a_closed_run_lets_nobody_in(handlers: Handlers) -> None:
    a, b = handlers("1:2"), handlers("1:2")
    a.next_rendezvous()
    a.set_closed()
    with pytest.raises(RendezvousClosedError, match="closed by node node0"):
        b.next_rendezvous()
    assert b.is_closed()


def test_too_few_nodes_end_the_run_for_those_who_wait(handlers: Handlers) -> None:
    a = handlers("2:2", timeout=0.5)
    with pytest.raises((RendezvousTimeoutError, RendezvousClosedError)):
        a.next_rendezvous()


@pytest.mark.parametrize(
    ("endpoint", "config", "error", "message"),
    [
        ("localhost:http", {}, UsageError, "HOST or HOST:PORT"),
        ("localhost:99999", {}, UsageError, "HOST or HOST:PORT"),
        ("localhost:0", {"join_window_s": "soon"}, UsageError, "join_window_s='soon'"),
        (
            *("192.0.2.1:1", {"timeout": 0.1, "is_host": "0", "insecure": "true"}, PlatformError),
            "nobody serves the run's store",
        ),
        (
            *("no-such-host.invalid:1", {"timeout": 0.1, "insecure": "true"}, PlatformError),
            "nobody serves the run's store",
        ),
        ("192.0.2.1:1", {}, UsageError, "without TLS: whoever reaches it over the network"),
    ],
)
def test_an_endpoint_that_cannot_be_used_gets_one_clear_line(
    handlers: Handlers, endpoint: str, config: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        handlers("1:1", endpoint, **config)
    assert "\n" not in str(caught.value)


def test_a_port_of_something_else_is_said(handlers: Handlers) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        sock, _ = listener.accept()
        sock.recv(1024)
        sock.sendall(b"SSH-2.0-OpenSSH_9.0\r\n")
        sock.close()

    thread = threading.Thread(target=answer)
    thread.start()
    port = listener.getsockname()[1]
    with pytest.raises(UsageError, match=f"localhost:{port} is in use by something that is not a store"):
        handlers("1:1", f"localhost:{port}")
    thread.join(WAIT_S)
    listener.close()


def test_a_port_of_another_run_is_said(handlers: Handlers) -> None:
    a = handlers("1:1")
    params = RendezvousParameters("autoglm", a.endpoint, "another", 1, 1, timeout=WAIT_S)
    with pytest.raises(UsageError, match="serves the run 'job', not 'another'"):
        AutoglmRendezvousHandler(params)


WORKER = """
import json, os, socket, sys, time
import torch, torch.distributed as dist
stop, address = sys.argv[1:]
dist.init_process_group("gloo")
tell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
told = False
while True:
    wanted = torch.tensor([float(os.path.exists(stop))])
    dist.all_reduce(wanted)
    if not told:
        told = True
        tell.sendto(json.dumps({
            "agent": os.environ["AGENT"], "pid": os.getpid(), "rank": dist.get_rank(),
            "world": dist.get_world_size(), "port": os.environ["MASTER_PORT"],
        }).encode(), address)
    if wanted.item():
        break
    time.sleep(0.02)
dist.destroy_process_group()
"""


class Torchrun:
    """Stock torchrun agents of one job. A worker tells when its world has done its first all-reduce."""

    def __init__(self, folder: Path, backend: str, endpoint: str) -> None:
        self._script = folder / "worker.py"
        self._script.write_text(WORKER)
        self._stop = folder / "stop"
        self._told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._told.bind(str(folder / "told"))
        self._told.settimeout(WAIT_S)
        self._folder = folder
        self._backend, self._endpoint = backend, endpoint
        self._worlds: dict[str, list[dict[str, Any]]] = {}
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as output:
            self.agents[name] = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:3", "--nproc-per-node=1"),
                    *(
                        f"--rdzv-backend={self._backend}",
                        f"--rdzv-endpoint={self._endpoint}",
                        "--rdzv-id=job",
                    ),
                    *("--rdzv-conf=join_window_s=2", "--max-restarts=3", "--monitor-interval=0.05"),
                    *(str(self._script), str(self._stop), str(self._folder / "told")),
                ],
                env=os.environ | {"AGENT": name},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def world(self, *names: str) -> dict[str, int]:
        """The pids, by agent, of the next world that has exactly these agents' workers."""
        while True:
            try:
                told = json.loads(self._told.recv(4096))
            except TimeoutError:
                logs = [path.read_text()[-3000:] for path in sorted(self._folder.glob("*.log"))]
                pytest.fail("no such world:\n" + "\n----\n".join(logs))
            members = self._worlds.setdefault(told["port"], [])
            members.append(told)
            if len(members) == told["world"] and {member["agent"] for member in members} == set(names):
                return {member["agent"]: member["pid"] for member in members}

    def finish(self, *names: str) -> list[int]:
        self._stop.touch()
        return [self.agents[name].wait(WAIT_S) for name in names]

    def close(self) -> None:
        for agent in self.agents.values():
            if agent.poll() is None:
                agent.kill()
            agent.wait(WAIT_S)
        for agent in self.agents.values():
            try:
                os.killpg(agent.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._told.close()


@pytest.fixture(params=["autoglm", pytest.param("autoglm-etcd", marks=needs_etcd)])
def torchrun(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Torchrun]:
    if request.param == "autoglm":
        job = Torchrun(tmp_path, request.param, f"localhost:{free_port()}")
        yield job
        job.close()
        return
    with Cluster(tmp_path / "etcd", members=3) as cluster:
        job = Torchrun(tmp_path, request.param, cluster.address.removeprefix("etcd://"))
        yield job
        job.close()
        assert cluster.ask(0, "kv/range", {"key": "AA==", "range_end": "AA=="}).get("count", 0) == 0


@pytest.mark.long
def test_stock_torchrun_lives_through_a_killed_worker_a_newcomer_and_a_killed_agent(
    torchrun: Torchrun,
) -> None:
    torchrun.start("a")
    torchrun.start("b")
    first = torchrun.world("a", "b")
    os.kill(first["b"], signal.SIGKILL)
    second = torchrun.world("a", "b")
    assert not set(first.values()) & set(second.values())
    torchrun.start("c")
    torchrun.world("a", "b", "c")
    torchrun.agents["c"].kill()
    torchrun.world("a", "b")
    assert torchrun.finish("a", "b") == [0, 0]
