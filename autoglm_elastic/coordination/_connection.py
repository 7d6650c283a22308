"""The server's side of one client: its bytes in and out, in TLS or plain, its watches, the leases bound to it. Never
blocks."""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from dataclasses import dataclass

from autoglm_elastic.coordination import limits
from autoglm_elastic.coordination._protocol import FrameError, take_frame
from autoglm_elastic.coordination._tls_layer import HANDSHAKE_RECORD, TlsLayer

READ_BYTES: int = 256 << 10
"""Read from one client before the others have their turn."""

SEAL_BYTES: int = 64 << 10
"""Of what a client is to get, so much is encrypted at a time: what it has not read is kept as it is."""


class SpeaksPlain(Exception):
    """A client that does not speak TLS, where nothing else is spoken."""


@dataclass(slots=True)
class ServerWatch:
    prefix: str
    resume: int


class Connection:
    """`deadline`: monotonic seconds by which it must have said hello (`greeted`), or be gone (`closing`);
    then None."""

    def __init__(self, sock: socket.socket, deadline: float | None, tls: TlsLayer | None = None) -> None:
        self.sock = sock
        self.deadline = deadline
        self.greeted = False
        self.closing = False
        self.watches: dict[int, ServerWatch] = {}
        self.leases: set[int] = set()
        self._inbox = bytearray()
        self._outbox: deque[memoryview] = deque()
        self._outbox_bytes = 0
        self._tls = tls
        self._sealed = memoryview(b"")
        """Of `_outbox`, what has been encrypted and not been sent."""

    @property
    def peer(self) -> str:
        try:
            return str(self.sock.getpeername()[0])
        except OSError:
            return "somebody who has left"

    @property
    def has_output(self) -> bool:
        return bool(self._outbox or self._sealed)

    def receive(self) -> bool:
        """Reads what is there. False: the client is gone. Raises ssl.SSLError when it does not get in, SpeaksPlain."""
        try:
            data = self.sock.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        if not self.closing:
            self._inbox += data if self._tls is None else self._opened(self._tls, data)
        return bool(data)

    def next_frame(self) -> bytes | None:
        nbytes_max = limits.FRAME_BYTES_MAX if self.greeted else limits.HELLO_BYTES_MAX
        return take_frame(self._inbox, nbytes_max)

    def _opened(self, tls: TlsLayer, data: bytes) -> bytes:
        if data and not tls.has_begun and data[0] != HANDSHAKE_RECORD:
            self._tls = None
            raise SpeaksPlain
        try:
            return tls.open(data)
        finally:
            if tls.has_output:
                self._sealed = memoryview(bytes(self._sealed) + tls.seal())

    def send(self, data: bytes) -> None:
        """Queues. Raises FrameError when the client has let too much pile up."""
        if self._outbox_bytes + len(data) > limits.OUTBOX_BYTES_MAX:
            raise FrameError(f"more than {limits.OUTBOX_BYTES_MAX} bytes unread")
        self._outbox.append(memoryview(data))
        self._outbox_bytes += len(data)

    def finish(self, last: bytes, deadline: float) -> None:
        """Sends `last` (b"": only what is encrypted already), then nothing more; what still comes in is read and
        thrown away, because closing a socket with unread input would destroy `last` on its way."""
        self._outbox.clear()
        self._outbox_bytes = 0
        if last:
            self.send(last)
        self.closing = True
        self.deadline = deadline

    def flush(self) -> bool:
        """Sends what the socket takes. False: the client is gone."""
        while (chunk := self._next_chunk()) is not None:
            try:
                sent = self.sock.send(chunk)
            except (BlockingIOError, InterruptedError):
                return True
            except OSError:
                return False
            if self._sealed:
                self._sealed = self._sealed[sent:]
            else:
                self._take(sent)
        if self.closing:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
        return True

    def _next_chunk(self) -> memoryview | None:
        """What goes out next, or None."""
        if not self._sealed and self._outbox and self._tls is not None:
            chunk = self._outbox[0][:SEAL_BYTES]
            self._sealed = memoryview(self._tls.seal(chunk))
            self._take(len(chunk))
        if self._sealed:
            return self._sealed
        return self._outbox[0] if self._outbox else None

    def _take(self, nbytes: int) -> None:
        """They are out of the outbox's first part."""
        self._outbox_bytes -= nbytes
        if nbytes == len(self._outbox[0]):
            self._outbox.popleft()
        else:
            self._outbox[0] = self._outbox[0][nbytes:]
