"""Which sockets of this process belong to a generation's groups, and how to break them.

Gloo offers no abort: shutting its connections down is what frees a collective that waits for a dead or
hanging peer. A listening socket is never touched: gloo's accept loop would end the process. Sockets are
remembered with their inode and looked at again before use, because a number may have been closed and given to
something else.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Iterator
from typing import Final

NEW_SOCKET_CHECK_S: Final = 0.01
"""Sockets that appear cannot be watched: while groups are being built a breaker looks again this often."""


_SYN_SENT: Final = 2
"""`tcpi_state` (linux/tcp_states.h), the first byte of TCP_INFO."""


def connected() -> dict[int, int]:
    """INET sockets of this process that are connected or about to be: descriptor → inode."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            fd = int(name)
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            with socket.socket(fileno=os.dup(fd)) as sock:
                if sock.family in (socket.AF_INET, socket.AF_INET6) and _has_peer(sock):
                    found[fd] = os.fstat(sock.fileno()).st_ino
    return found


def _has_peer(sock: socket.socket) -> bool:
    """False for one that listens. A peer whose host is gone never answers: breaking frees that wait, too."""
    try:
        sock.getpeername()
    except OSError:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _SYN_SENT
    return True


class BreakableSockets:
    """The sockets opened while inside of `noting`, on any thread. `shutdown` may come from another thread, at
    any time, also meanwhile or before: what is opened after it is broken at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._broken = False
        self._built = threading.Event()
        self._depth = 0
        self._before: dict[int, int] = {}
        self._ours: dict[int, int] = {}
        self._built.set()

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """May be nested."""
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._before = connected()
                self._built.clear()
        try:
            yield
        finally:
            self._note()
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    self._built.set()
            if self._broken:
                self._shutdown_known()

    def shutdown(self, limit_s: float) -> None:
        """Break all of them; while `noting` is under way go on with those that appear, at most
        `limit_s`."""
        self._broken = True
        for _ in range(max(1, int(limit_s / NEW_SOCKET_CHECK_S))):
            building = not self._built.is_set()
            if building:
                self._note()
            self._shutdown_known()
            if not building or self._built.wait(NEW_SOCKET_CHECK_S):
                break
        self._shutdown_known()

    def _note(self) -> None:
        now = connected()
        with self._lock:
            # A breaker that looked while `noting` ended may have seen sockets of what comes after it.
            if self._depth:
                self._ours.update({fd: inode for fd, inode in now.items() if self._before.get(fd) != inode})

    def _shutdown_known(self) -> None:
        with self._lock:
            ours = list(self._ours.items())
        for fd, inode in ours:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
                if os.fstat(sock.fileno()).st_ino == inode:
                    sock.shutdown(socket.SHUT_RDWR)
