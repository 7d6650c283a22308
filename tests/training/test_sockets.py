"""Breaking frees whoever waits for a peer, also one that waits to be connected to a host that is gone."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from autoglm_elastic.training import _sockets
from autoglm_elastic.training._sockets import BreakableSockets, connected

WAIT_S = 20.0
PROMPT_S = 2.0


@pytest.fixture
def blackhole() -> Iterator[tuple[str, int]]:
    """Nobody accepts there, and the queue is full: the kernel answers nobody any more, as if the host were gone."""
    with contextlib.ExitStack() as open_ones:
        listener = open_ones.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        while True:
            filler = open_ones.enter_context(socket.socket())
            filler.settimeout(0.2)
            try:
                filler.connect(listener.getsockname())
            except TimeoutError:
                break
        yield listener.getsockname()


def wait_for_a_socket(before: dict[int, int]) -> None:
    pause = threading.Event()  # that a socket appears cannot be watched
    for _ in range(int(WAIT_S / 0.01)):
        if connected().keys() - before.keys():
            return
        pause.wait(0.01)
    raise AssertionError("no new socket")


def test_whoever_connects_to_a_host_that_is_gone_is_freed(blackhole: tuple[str, int]) -> None:
    sockets, before = BreakableSockets(), connected()

    def connect() -> None:
        with sockets.noting(), socket.socket() as one:
            one.connect(blackhole)  # blocking, as a library's may be

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connect)
        wait_for_a_socket(before)
        sockets.shutdown(PROMPT_S)
        with pytest.raises(OSError, match=r"reset|refused|aborted|not connected"):
            waiting.result(PROMPT_S)


def test_one_that_listens_and_those_of_others_are_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        client = socket.create_connection(theirs.getsockname())
        accepted, _ = theirs.accept()
        with client, accepted:
            sockets = BreakableSockets()
            with sockets.noting(), socket.create_server(("127.0.0.1", 0)) as ours:
                sockets.shutdown(0.1)
                with socket.create_connection(ours.getsockname()) as late:
                    ours.accept()[0].close()
                    assert late.recv(1) == b""
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"


def test_what_comes_after_is_left_alone_by_a_breaker_that_still_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sockets = BreakableSockets()
    looks, ended = threading.Event(), threading.Event()
    breaker = ""

    def slow() -> dict[int, int]:
        if threading.current_thread().name == breaker:
            looks.set()
            assert ended.wait(WAIT_S)
        return connected()

    monkeypatch.setattr(_sockets, "connected", slow)
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as opened:
        thread = threading.Thread(target=sockets.shutdown, args=(PROMPT_S,))
        breaker = thread.name
        with sockets.noting():
            thread.start()
            assert looks.wait(WAIT_S)
        client = opened.enter_context(socket.create_connection(listener.getsockname()))
        accepted = opened.enter_context(listener.accept()[0])
        ended.set()
        thread.join(WAIT_S)
        client.sendall(b"x")
        assert accepted.recv(1) == b"x"
