"""A TCP proxy that can be cut: between an agent and the store, for tests of what a broken network does."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 s: closing sends RST."""


class Proxy:
    """Forwards a port of its own to `target` until it is told otherwise; one thread.

    `hold`: connections stay, nothing is forwarded (what is sent meanwhile arrives after `heal`, as with TCP).
    `refuse`: connections are reset, new ones too. `reset`: connections are reset, new ones are served.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._wake, self._woken = socket.socketpair()
        self._lock = threading.Lock()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._mode = "forward"
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._set("closed")
        self._thread.join(10)
        for end in (self._listener, self._wake, self._woken):
            end.close()

    def hold(self) -> None:
        self._set("hold")

    def heal(self) -> None:
        self._set("forward")

    def refuse(self) -> None:
        self._set("refuse")

    def reset(self) -> None:
        self._set("reset")

    def _set(self, mode: str) -> None:
        """In force when this returns."""
        with self._lock:
            self._mode = mode
            if mode in ("refuse", "reset", "closed"):
                self._drop_all()
        self._wake.send(b"x")

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._mode == "closed":
                    return
                reading = [] if self._mode == "hold" else list(self._pairs)
            ready, _, _ = select.select([self._listener, self._woken, *reading], [], [])
            with self._lock:
                for end in ready:
                    if end is self._woken:
                        self._woken.recv(4096)
                    elif end is self._listener:
                        self._accept()
                    elif self._mode != "hold":
                        self._forward(end)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if self._mode in ("refuse", "closed"):
            _reset(near)
            return
        try:
            far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
        except OSError:
            _reset(near)
            return
        self._pairs[near], self._pairs[far] = far, near

    def _forward(self, end: socket.socket) -> None:
        other = self._pairs.get(end)
        if other is None:
            return
        data = b""
        with contextlib.suppress(OSError):
            data = end.recv(1 << 16)
            if data:
                other.sendall(data)
        if not data:
            for each in (end, other):
                self._pairs.pop(each, None)
                each.close()

    def _drop_all(self) -> None:
        for end in self._pairs:
            _reset(end)
        self._pairs.clear()


def _reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.close()
