"""One end of a TLS connection, without its socket: bytes from the wire in, plain bytes out, and the reverse. Never
blocks, so that the server's loop and a client's two threads can use the same."""

from __future__ import annotations

import ssl
import threading
from typing import Any, Final

_READ_BYTES: Final = 64 << 10

HANDSHAKE_RECORD: Final = 0x16
"""The first byte of everything that a client who speaks TLS begins with."""


class TlsLayer:
    """Thread safe; whoever sends what `seal` returned must send it before anybody else seals.

    Args:
        peer_name: client's side: what the server's certificate must be made out to, where `context` checks names.
    """

    def __init__(self, context: ssl.SSLContext, *, server_side: bool, peer_name: str | None = None) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side, peer_name)
        self._lock = threading.Lock()
        self.has_begun = self.is_established = False

    @property
    def has_output(self) -> bool:
        """Whether something is to be sent although nobody had anything to say: a handshake, an alert."""
        return self._outgoing.pending > 0

    def peer(self) -> dict[str, Any]:
        """The certificate that the other end has shown, by field, once `is_established`."""
        with self._lock:
            return dict(self._tls.getpeercert() or {})

    def open(self, data: bytes) -> bytes:
        """What is to be read, after `data` came in; b"" as long as that is no whole record, or a part of the handshake
        (a client begins it with `open(b"")`). Raises ssl.SSLError; then an alert may be left to be sent."""
        with self._lock:
            self.has_begun = True
            self._incoming.write(data)
            opened = bytearray()
            try:
                if not self.is_established:
                    self._tls.do_handshake()
                    self.is_established = True
                while chunk := self._tls.read(_READ_BYTES):
                    opened += chunk
            except ssl.SSLWantReadError:
                pass
            return bytes(opened)

    def seal(self, data: bytes | memoryview = b"") -> bytes:
        """What is to be sent, for `data` and before it. Raises ssl.SSLError."""
        with self._lock:
            if data:
                self._tls.write(data)
            return self._outgoing.read()
