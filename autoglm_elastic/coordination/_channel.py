"""The client's end of one connection: open with a hello, send frames, receive messages."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Final

from autoglm_elastic.coordination import _protocol as wire
from autoglm_elastic.coordination import limits
from autoglm_elastic.errors import PlatformError
from autoglm_elastic.ports import StoreUnavailable

_READ_BYTES: Final = 256 << 10


class Channel:
    """`store` is the identity of the server. One thread receives; any may send."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._inbox = bytearray()
        self._sending = threading.Lock()
        self.store = ""
        self.local_host: str = sock.getsockname()[0]

    @classmethod
    def open(cls, address: tuple[str, int], timeout_s: float, realm: str) -> Channel:
        """Raises StoreUnavailable when nobody is there, PlatformError when it is not our store."""
        where = f"{address[0]}:{address[1]}"
        try:
            sock = socket.create_connection(address, timeout_s)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise StoreUnavailable(f"no store at {where}: {reason}", sent=False) from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A server whose machine went away is noticed after this, not after the system's quarter of an hour.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))
        channel = cls(sock)
        try:
            channel._greet(where, realm)
        except BaseException:
            channel.close()
            raise
        return channel

    def _greet(self, where: str, realm: str) -> None:
        stranger = PlatformError(
            f"port {where} is in use by something that is not a store of AutoGLM",
            do="choose another --rdzv-endpoint",
        )
        try:
            self.send(wire.frame(wire.Hello(wire.PROTOCOL, realm)))
            hello = self.receive()
        except wire.FrameError:
            raise stranger from None
        except TimeoutError:
            raise PlatformError(
                f"port {where} accepts connections but says nothing: it is no store of AutoGLM, or it hangs",
                do="choose another --rdzv-endpoint, or end what holds the port",
            ) from None
        except OSError as error:
            raise StoreUnavailable(
                f"the store at {where} closed the connection: {error}", sent=False
            ) from error
        if isinstance(hello, wire.Refusal):
            raise PlatformError(
                f"the store at {where} refused us: {hello.message}", do="choose another --rdzv-endpoint"
            )
        if not isinstance(hello, wire.Hello) or hello.protocol != wire.PROTOCOL:
            raise stranger
        self.store = hello.store
        # From here on only sending is bounded by the socket's own time; receiving waits for what comes.
        self._sock.settimeout(None)

    def send(self, data: bytes) -> None:
        """Raises OSError, also when the server has not read for the connection's timeout
        (TCP_USER_TIMEOUT)."""
        with self._sending:
            self._sock.sendall(data)

    def receive(self) -> wire.ToClient:
        """Waits for one message. Raises OSError when the connection ends, FrameError on bytes that make no
        sense."""
        while (data := wire.take_frame(self._inbox, limits.FRAME_BYTES_MAX)) is None:
            received = self._sock.recv(_READ_BYTES)
            if not received:
                raise ConnectionResetError("the store closed the connection")
            self._inbox += received
        return wire.decode_to_client(data)

    def shut(self) -> None:
        """Wakes whoever receives; safe from any thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shut()
        self._sock.close()
