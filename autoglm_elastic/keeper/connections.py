"""Who is connected to a keeper: one loop that accepts, reads and writes without ever waiting for anybody.

It knows frames, not what they mean."""

from __future__ import annotations

import collections
import contextlib
import os
import select
import selectors
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from autoglm_elastic.errors import ElasticError, UsageError
from autoglm_elastic.keeper import address, messages
from autoglm_elastic.keeper.memory import Memory
from autoglm_elastic.keeper.messages import one_line

READ_BYTES: Final = 1 << 20
UNSENT_BYTES_MAX: Final = 64 << 20
"""What a client may leave unread before it is taken for helpless and let go."""
CONNECTIONS_MAX: Final = 4096


@dataclass(slots=True, eq=False)
class Client:
    """One connection."""

    socket: socket.socket
    pid: int
    frames: messages.Frames = field(default_factory=messages.Frames)
    known: messages.Known = field(default_factory=messages.Known)
    unsent: collections.deque[tuple[bytes, int]] = field(default_factory=collections.deque)
    """(bytes, descriptor that goes with them or -1)."""
    unsent_nbytes: int = 0
    rank: int | None = None
    """None until it has said hello; -1 for an agent."""
    segments: dict[int, Memory] = field(default_factory=dict)
    left_well: bool = False
    gone: bool = False


class Hub:
    """All connections.

    Args:
        obey: carries out a request; what it raises costs the client its connection.
        refused: (client, why) before a client loses its connection for what it sent.
        lost: the client is gone, in whatever way.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        obey: Callable[[Client, messages.Request, bytes], None],
        refused: Callable[[Client, str], None],
        lost: Callable[[Client], None],
    ) -> None:
        self.clients: set[Client] = set()
        self._listener, self._obey, self._refused, self._lost = listener, obey, refused, lost
        self._todo: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._selector.register(listener, selectors.EVENT_READ)

    def turn(self, timeout_s: float) -> None:
        """Waits for something to happen and deals with all that has."""
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self.accept()
            elif isinstance(key.data, Client):
                if events & selectors.EVENT_WRITE:
                    self._flush(key.data)
                if events & selectors.EVENT_READ:
                    self._drain(key.data)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._todo:
            self._todo.popleft()()

    def post(self, action: Callable[[], None]) -> None:
        """From other threads: `action` runs in the loop."""
        self._todo.append(action)
        os.eventfd_write(self._wake, 1)

    @property
    def is_quiet(self) -> bool:
        return not (self.clients or self._todo)

    def close(self) -> None:
        """Nobody is connected any more, and nobody can connect."""
        self._selector.close()
        self._listener.close()
        os.close(self._wake)

    def accept(self) -> None:
        """Everybody who waits to be let in."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            try:
                connection.setblocking(False)
                client = Client(connection, address.peer_of(connection))
                if len(self.clients) >= CONNECTIONS_MAX:
                    raise UsageError(f"{len(self.clients)} connections")
                self._selector.register(connection, selectors.EVENT_READ, client)
            except (ElasticError, OSError):
                connection.close()
                continue
            self.clients.add(client)

    def send(self, client: Client, message: messages.Message, fd: int = -1) -> None:
        """To a client that is gone: nothing."""
        if client.gone:
            return
        data = messages.frame(message)
        client.unsent.append((data, fd))
        client.unsent_nbytes += len(data)
        self._flush(client)

    def look_for_the_dead(self) -> None:
        """A death that the kernel knows of counts now, although its message still lies unread."""
        for client in list(self.clients):
            poller = select.poll()
            poller.register(client.socket, select.POLLRDHUP)
            if poller.poll(0):
                self._drain(client)

    def _drain(self, client: Client) -> None:
        """Reads and obeys what is there; a malformed message costs the client its connection."""
        while not client.gone:
            try:
                data, fds = messages.receive(client.socket, READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                self._lose(client)
                return
            for fd in fds:
                os.close(fd)
            if not data:
                self._lose(client)
                return
            try:
                client.frames.feed(data)
                while not client.gone and (frame := client.frames.next()):
                    self._obey(client, messages.REQUESTS.decode(frame[0]), frame[1])
            except (ElasticError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
                self._refuse(client, one_line(error))
            except Exception as error:  # noqa: BLE001 - a bug met by one client's message must not cost the others
                self._refuse(client, one_line(error))

    def _refuse(self, client: Client, reason: str) -> None:
        self.send(client, messages.Refused(0, reason))
        self._refused(client, reason)
        self._lose(client)

    def _lose(self, client: Client) -> None:
        if client.gone:
            return
        client.gone = True
        self.clients.discard(client)
        self._selector.unregister(client.socket)
        client.socket.close()
        self._lost(client)

    def _flush(self, client: Client) -> None:
        try:
            while client.unsent:
                data, fd = client.unsent.popleft()
                sent = 0
                try:
                    sent = (
                        socket.send_fds(client.socket, [data], [fd]) if fd >= 0 else client.socket.send(data)
                    )
                finally:
                    if sent < len(data):
                        client.unsent.appendleft((data[sent:], -1 if sent else fd))
                    client.unsent_nbytes -= sent
        except BlockingIOError:
            pass
        except OSError:
            self._lose(client)
            return
        if client.unsent_nbytes > UNSENT_BYTES_MAX:
            self._lose(client)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
        self._selector.modify(client.socket, events, client)
