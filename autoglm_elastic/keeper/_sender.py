"""What is said to the other end of a connection leaves at once as far as the system takes it, and the rest in a thread:
who says it waits for nobody, also when the other end is stopped and reads nothing."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

WAITING_BYTES_MAX: Final = 256 << 20
"""Of frames that have not left. The layout of a large state is some megabytes, told once."""


class Sender:
    """Frames leave in the order in which they were put. Thread safe.

    Args:
        connection: has a timeout, which bounds every send.
        lost: called with what went wrong when nothing can be sent any more, from either thread.
    """

    def __init__(self, connection: socket.socket, lost: Callable[[OSError], None]) -> None:
        self._socket, self._lost = connection, lost
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._nbytes = 0
        """Of what waits and what is being sent."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="autoglm-keeper-send", daemon=True)

    def put(self, frame: bytes) -> bool:
        """Returns at once. False when it is not taken: too much waits already, or it is closed."""
        try:
            with self._changed:
                if self._closed or (self._nbytes and self._nbytes + len(frame) > WAITING_BYTES_MAX):
                    return False
                rest = frame if self._nbytes else frame[self._write(frame) :]
                if rest:
                    if not self._thread.ident:
                        self._thread.start()
                    self._waiting.append(rest)
                    self._nbytes += len(rest)
                    self._changed.notify_all()
                return True
        except OSError as error:
            self._end(error)
            return False

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything that was put has left; False when it has not."""
        with self._changed:
            self._changed.wait_for(lambda: not self._nbytes or self._closed, timeout=timeout_s)
            return not self._nbytes

    def close(self) -> None:
        """What has not left is dropped; a send under way ends with the connection. Idempotent."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                frame = self._waiting.popleft()
            try:
                self._socket.sendall(frame)
            except OSError as error:
                self._end(error)
                return
            with self._changed:
                self._nbytes -= len(frame)
                self._changed.notify_all()

    def _write(self, frame: bytes) -> int:
        """How much the system took. A socket with a timeout does not block below Python, which waits above."""
        try:
            return os.write(self._socket.fileno(), frame)
        except BlockingIOError:
            return 0

    def _end(self, error: OSError) -> None:
        self.close()
        self._lost(error)
