"""The embedded server and its client: broken connections, dead clients, hostile input."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from autoglm_elastic.coordination import StoreClient, StoreServer, limits
from autoglm_elastic.errors import PlatformError
from autoglm_elastic.ports import EventKind, Put, StoreUnavailable, WatchEvent

WAIT_S = 20.0


@pytest.fixture
def server() -> Iterator[StoreServer]:
    server = StoreServer("127.0.0.1", 0, realm="run")
    yield server
    server.close()


@pytest.fixture
def client(server: StoreServer) -> Iterator[StoreClient]:
    client = StoreClient(*server.address, realm="run")
    yield client
    client.close()


class Relay:
    """A TCP proxy whose connections can be cut, and that can refuse new ones: a network that fails."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._pairs: list[socket.socket] = []
        self._open = threading.Event()
        self._open.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._open.is_set():
                near.close()
                continue
            far = socket.create_connection(self._target)
            self._pairs += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self, *, for_good: bool = False) -> None:
        if for_good:
            self._open.clear()
        for end in self._pairs:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for end in self._pairs:
            end.close()


@pytest.fixture
def relay(server: StoreServer) -> Iterator[Relay]:
    relay = Relay(server.address)
    yield relay
    relay.close()


def test_a_watch_resumes_after_the_connection_broke(relay: Relay, client: StoreClient) -> None:
    seen: queue.Queue[WatchEvent] = queue.Queue()
    states: queue.Queue[bool] = queue.Queue()
    far = StoreClient(*relay.address, realm="run", on_connection=states.put)
    far.watch("/", 1, seen.put)
    client.put("/a", 1)
    assert seen.get(timeout=WAIT_S).key == "/a"
    relay.cut(for_good=True)
    assert states.get(timeout=WAIT_S) is False
    client.txn((), [Put("/b", 2), Put("/c", 3)])
    relay.mend()
    assert states.get(timeout=WAIT_S) is True
    client.put("/d", 4)
    assert [seen.get(timeout=WAIT_S).key for _ in range(3)] == ["/b", "/c", "/d"]
    assert far.get("/d") is not None
    far.close()


def test_a_read_waits_for_the_new_connection_and_a_dead_network_is_unavailable(relay: Relay) -> None:
    states: queue.Queue[bool] = queue.Queue()
    far = StoreClient(*relay.address, timeout_s=0.5, on_connection=states.put)
    relay.cut(for_good=True)
    assert states.get(timeout=WAIT_S) is False
    with pytest.raises(StoreUnavailable) as caught:
        far.put("/a", 1)
    assert not caught.value.sent
    relay.mend()
    assert states.get(timeout=WAIT_S) is True
    assert far.get("/a") is None
    far.close()


def test_a_write_without_an_answer_may_have_happened() -> None:
    """A server that says hello and then dies with the request in its hands."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        listener.close()
        sock.recv(65536)
        sock.sendall(framed({"op": "hello", "protocol": "autoglm-store/1", "store": "s"}))
        sock.recv(65536)
        sock.close()

    thread = threading.Thread(target=serve)
    thread.start()
    client = StoreClient(*listener.getsockname())
    with pytest.raises(StoreUnavailable) as caught:
        client.put("/a", 1)
    assert caught.value.sent
    client.close()
    thread.join(WAIT_S)


def test_another_store_on_the_same_address_makes_watches_lost() -> None:
    first = StoreServer("127.0.0.1", 0)
    seen: queue.Queue[WatchEvent] = queue.Queue()
    client = StoreClient(*first.address)
    client.put("/a", 1)
    client.watch("/", 1, seen.put)
    assert seen.get(timeout=WAIT_S).key == "/a"
    first.close()
    second = StoreServer("127.0.0.1", first.address[1])
    assert seen.get(timeout=WAIT_S).lost
    client.put("/b", 1)
    assert seen.get(timeout=WAIT_S).key == "/b"
    client.close()
    second.close()


def test_the_death_of_a_client_ends_its_leases_at_once(server: StoreServer, client: StoreClient) -> None:
    """The lease is an hour long: only the closed connection can have ended it."""
    script = (
        "import sys, time\n"
        "from autoglm_elastic.coordination import StoreClient\n"
        "client = StoreClient(sys.argv[1], int(sys.argv[2]))\n"
        "client.put('/member', 1, lease=client.lease_grant(3600.0))\n"
        "time.sleep(60)\n"
    )
    seen: queue.Queue[WatchEvent] = queue.Queue()
    client.watch("/member", 1, seen.put)
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, server.address)])
    try:
        assert seen.get(timeout=WAIT_S).kind is EventKind.PUT
        os.kill(process.pid, signal.SIGKILL)
        assert seen.get(timeout=WAIT_S).kind is EventKind.DELETE
    finally:
        process.kill()
        process.wait(WAIT_S)


def test_a_client_that_comes_back_in_time_keeps_its_lease() -> None:
    server = StoreServer("127.0.0.1", 0, disconnect_grace_s=60.0)
    relay = Relay(server.address)
    states: queue.Queue[bool] = queue.Queue()
    far = StoreClient(*relay.address, on_connection=states.put)
    lease = far.lease_grant(3600.0)
    far.put("/member", 1, lease=lease)
    relay.cut()
    assert [states.get(timeout=WAIT_S) for _ in range(2)] == [False, True]
    assert far.lease_keep_alive(lease) == 3600.0
    assert far.get("/member") is not None
    far.close()
    relay.close()
    server.close()


def test_an_unbound_lease_outlives_its_connection(server: StoreServer, client: StoreClient) -> None:
    other = StoreClient(*server.address, bind_leases=False)
    bound = StoreClient(*server.address)
    other.put("/unbound", 1, lease=other.lease_grant(3600.0))
    bound.put("/bound", 1, lease=bound.lease_grant(3600.0))
    seen: queue.Queue[WatchEvent] = queue.Queue()
    client.watch("/", client.txn((), ()).revision + 1, seen.put)
    other.close()
    bound.close()
    event = seen.get(timeout=WAIT_S)
    assert (event.kind, event.key) == (EventKind.DELETE, "/bound")
    assert client.get("/unbound") is not None


# Hostile or mistaken input


def framed(message: object) -> bytes:
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack(">I", len(data)) + data


HELLO = framed({"op": "hello", "protocol": "autoglm-store/1"})


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "bytes; at most"),
        (struct.pack(">I", limits.HELLO_BYTES_MAX + 1), "bytes; at most"),
        (framed({"op": "get", "id": 1, "key": "/a"}), "not a message"),
        (framed({"op": "hello", "protocol": "autoglm-store/99"}), "speaks autoglm-store/1"),
        (framed({"op": "hello", "protocol": "autoglm-store/1", "realm": "other"}), "serves the run 'run'"),
        (HELLO + struct.pack(">I", limits.FRAME_BYTES_MAX + 1), "bytes; at most"),
        (HELLO + framed(b"\xff\xfe{"), "not a message"),
        (HELLO + framed(b"{" * 100), "not a message"),
        (HELLO + framed(b'{"op":"txn","id":1,"compares":[],"operations":' + b"[" * 100_000), "not a message"),
        (HELLO + framed({"op": "explode", "id": 1}), "not a message"),
        (HELLO + framed({"op": "get", "id": 1, "key": "/a", "more": 1}), "not a message"),
        (HELLO + framed({"op": "get", "id": "one", "key": "/a"}), "not a message"),
        (HELLO + framed([1, 2, 3]), "not a message"),
    ],
)
def test_hostile_input_ends_its_connection_with_a_reason(
    server: StoreServer, client: StoreClient, sent: bytes, said: str
) -> None:
    client.put("/kept", 1)
    with socket.create_connection(server.address) as stranger:
        stranger.settimeout(WAIT_S)
        stranger.sendall(sent)
        received = b""
        while data := stranger.recv(65536):
            received += data
    assert said.encode() in received
    assert client.get("/kept") is not None


def test_a_silent_stranger_is_dropped(
    server: StoreServer, client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HELLO_S_MAX", 0.05)
    with socket.create_connection(server.address) as stranger:
        stranger.settimeout(WAIT_S)
        assert stranger.recv(1) == b""
    assert client.get("/a") is None


def test_a_client_that_does_not_read_is_dropped_and_nobody_waits_for_it(
    server: StoreServer, client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "OUTBOX_BYTES_MAX", 1 << 20)
    watch = framed({"op": "watch", "id": 1, "watch": 1, "prefix": "/", "from_revision": 1})
    with socket.create_connection(server.address) as deaf:
        deaf.sendall(HELLO + watch)
        for _ in range(40):
            client.put("/big", "v" * (1 << 18))
        deaf.settimeout(WAIT_S)
        with contextlib.suppress(ConnectionError):
            while deaf.recv(1 << 20):
                pass
    assert client.get("/big") is not None


def test_a_port_that_is_taken_says_so(server: StoreServer) -> None:
    with pytest.raises(PlatformError, match=r"cannot listen on 127\.0\.0\.1:.*in use"):
        StoreServer(*server.address)


def test_a_client_of_another_run_is_told(server: StoreServer) -> None:
    with pytest.raises(PlatformError, match="serves the run 'run', not 'other'"):
        StoreClient(*server.address, realm="other")


def test_something_else_on_the_port_is_told() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        sock.recv(1024)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        sock.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(PlatformError, match="in use by something that is not a store of AutoGLM"):
        StoreClient(*listener.getsockname())
    thread.join(WAIT_S)
    listener.close()


def test_nobody_there_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    with pytest.raises(StoreUnavailable, match="Connection refused"):
        StoreClient(*address)


def test_a_lingering_server_serves_until_the_last_client_has_left(
    server: StoreServer, client: StoreClient
) -> None:
    closing = threading.Thread(target=server.close, args=(WAIT_S,))
    closing.start()
    client.put("/a", 1)
    assert client.get("/a") is not None
    client.close()
    closing.join(WAIT_S)
    assert not closing.is_alive()
