"""The client's end of one connection, in TLS or plain: open with a hello, send frames, receive messages."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Final

from autoglm_elastic.coordination import _protocol as wire
from autoglm_elastic.coordination import limits
from autoglm_elastic.coordination._tls_layer import TlsLayer
from autoglm_elastic.coordination.refusals import StoreDenied
from autoglm_elastic.coordination.tls import Credentials, reason
from autoglm_elastic.errors import PlatformError
from autoglm_elastic.ports import StoreUnavailable

_READ_BYTES: Final = 256 << 10
_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")


@dataclass(frozen=True, slots=True)
class Security:
    """Who we are, and whom the server's certificate must be made out to."""

    credentials: Credentials
    peer_name: str


class Channel:
    """`store` is the identity of the server. One thread receives; any may send."""

    def __init__(self, sock: socket.socket, security: Security | None = None) -> None:
        self._sock = sock
        self._tls: TlsLayer | None = None
        if security is not None:
            context = security.credentials.for_client()
            self._tls = TlsLayer(context, server_side=False, peer_name=security.peer_name)
        self._inbox = bytearray()
        self._sending = threading.Lock()
        self.store = ""
        self.local_host: str = sock.getsockname()[0]

    @classmethod
    def open(
        cls, address: tuple[str, int], timeout_s: float, realm: str, security: Security | None = None
    ) -> Channel:
        """Raises StoreUnavailable when nobody is there, PlatformError when it is not our store, StoreDenied when one
        of us does not accept the other's certificate."""
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
        try:
            channel = cls(sock, security)
        except BaseException:
            sock.close()
            raise
        try:
            channel._greet(where, realm, timeout_s)
        except BaseException:
            channel.close()
            raise
        return channel

    def _greet(self, where: str, realm: str, timeout_s: float) -> None:
        stranger = PlatformError(
            f"port {where} is in use by something that is not a store of AutoGLM",
            do="choose another --rdzv-endpoint",
        )
        try:
            if self._tls is not None:
                self._shake_hands(self._tls, timeout_s)
            self.send(wire.frame(wire.Hello(wire.PROTOCOL, realm)))
            hello = self.receive()
        except wire.FrameError:
            raise stranger from None
        except TimeoutError:
            raise PlatformError(
                f"port {where} accepts connections but says nothing: it is no store of AutoGLM, or it hangs",
                do="choose another --rdzv-endpoint, or end what holds the port",
            ) from None
        except ssl.SSLError as error:
            raise _turned_away(where, error) from error
        except OSError as error:
            raise StoreUnavailable(
                f"the store at {where} closed the connection: {error}", sent=False
            ) from error
        if isinstance(hello, wire.Refusal):
            if hello.code == StoreDenied.code:
                raise StoreDenied(
                    f"the store at {where} refused us: {hello.message}",
                    do="give tls.ca, tls.cert and tls.key (docs/tls.md)",
                )
            raise PlatformError(
                f"the store at {where} refused us: {hello.message}", do="choose another --rdzv-endpoint"
            )
        if not isinstance(hello, wire.Hello) or hello.protocol != wire.PROTOCOL:
            raise stranger
        self.store = hello.store
        # From here on only sending is bounded by the socket's own time; receiving waits for what comes.
        self._sock.settimeout(None)

    def _shake_hands(self, tls: TlsLayer, timeout_s: float) -> None:
        """Raises OSError. (The server looks at our certificate after this, and may turn us away.)"""
        deadline = time.monotonic() + timeout_s
        received = b""
        while True:
            try:
                tls.open(received)
            finally:
                self._sock.sendall(tls.seal())
            if tls.is_established:
                break
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            received = self._sock.recv(_READ_BYTES)
            if not received:
                raise ConnectionResetError("it ended the handshake")
        self._sock.settimeout(timeout_s)

    def send(self, data: bytes) -> None:
        """Raises OSError, also when the server has not read for the connection's timeout
        (TCP_USER_TIMEOUT)."""
        with self._sending:
            self._sock.sendall(data if self._tls is None else self._tls.seal(data))

    def receive(self) -> wire.ToClient:
        """Waits for one message. Raises OSError when the connection ends, FrameError on bytes that make no
        sense."""
        while (data := wire.take_frame(self._inbox, limits.FRAME_BYTES_MAX)) is None:
            received = self._sock.recv(_READ_BYTES)
            if not received:
                raise ConnectionResetError("the store closed the connection")
            if self._tls is not None:
                received = self._tls.open(received)
                if self._tls.has_output:
                    self.send(b"")
            self._inbox += received
        return wire.decode_to_client(data)

    def shut(self) -> None:
        """Wakes whoever receives; safe from any thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shut()
        self._sock.close()


def _turned_away(where: str, error: ssl.SSLError) -> PlatformError | StoreDenied:
    if isinstance(error, ssl.SSLCertVerificationError):
        return StoreDenied(
            f"the store at {where} has a certificate that we do not accept: {reason(error)}",
            do="give tls.ca that it is of, and tls.server_name where it is made out to another name",
        )
    if error.reason in _NO_TLS:
        return PlatformError(
            f"port {where} does not speak TLS: it is a store without it, or something else",
            do="start the agent that hosts the store with the same tls settings, or choose another --rdzv-endpoint",
        )
    return StoreDenied(
        f"the store at {where} does not accept our certificate: {reason(error)}",
        do="give tls.cert and tls.key of its CA; its agent's log says more",
    )
