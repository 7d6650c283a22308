"""The server's side of one client: its bytes in and out, its watches, the leases bound to it. Never
blocks."""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from dataclasses import dataclass

from autoglm_elastic.coordination import limits
from autoglm_elastic.coordination._protocol import FrameError, take_frame

READ_BYTES: int = 256 << 10
"""Read from one client before the others have their turn."""


@dataclass(slots=True)
class ServerWatch:
    prefix: str
    resume: int


class Connection:
    """`deadline`: monotonic seconds by which it must have said hello (`greeted`), or be gone (`closing`);
    then None."""

    def __init__(self, sock: socket.socket, deadline: float | None) -> None:
        self.sock = sock
        self.deadline = deadline
        self.greeted = False
        self.closing = False
        self.watches: dict[int, ServerWatch] = {}
        self.leases: set[int] = set()
        self._inbox = bytearray()
        self._outbox: deque[memoryview] = deque()
        self._outbox_bytes = 0

    @property
    def has_output(self) -> bool:
        return bool(self._outbox)

    def receive(self) -> bool:
        """Reads what is there. False: the client is gone."""
        try:
            data = self.sock.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        if not self.closing:
            self._inbox += data
        return bool(data)

    def next_frame(self) -> bytes | None:
        nbytes_max = limits.FRAME_BYTES_MAX if self.greeted else limits.HELLO_BYTES_MAX
        return take_frame(self._inbox, nbytes_max)

    def send(self, data: bytes) -> None:
        """Queues. Raises FrameError when the client has let too much pile up."""
        if self._outbox_bytes + len(data) > limits.OUTBOX_BYTES_MAX:
            raise FrameError(f"more than {limits.OUTBOX_BYTES_MAX} bytes unread")
        self._outbox.append(memoryview(data))
        self._outbox_bytes += len(data)

    def finish(self, last: bytes, deadline: float) -> None:
        """Sends `last`, then nothing more; what still comes in is read and thrown away, because closing a
        socket with unread input would destroy `last` on its way."""
        self._outbox.clear()
        self._outbox_bytes = 0
        self.send(last)
        self.closing = True
        self.deadline = deadline

    def flush(self) -> bool:
        """Sends what the socket takes. False: the client is gone."""
        while self._outbox:
            try:
                sent = self.sock.send(self._outbox[0])
            except (BlockingIOError, InterruptedError):
                return True
            except OSError:
                return False
            self._outbox_bytes -= sent
            if sent == len(self._outbox[0]):
                self._outbox.popleft()
            else:
                self._outbox[0] = self._outbox[0][sent:]
        if self.closing:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
        return True
