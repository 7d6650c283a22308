"""The store that the first agent hosts: one thread, one selector, `StoreState` behind TCP.

Its life is that of its process. Hostile or broken input closes the connection it came from with one clear
message and touches nobody else. Nothing received is ever unpickled or evaluated; everything is bounded
(`limits`). With credentials it speaks TLS only, and only with who has a certificate of the same CA: nobody else
gets as far as a hello.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import ssl
import threading
import uuid
from typing import Final

from autoglm_elastic.coordination import _protocol as wire
from autoglm_elastic.coordination import limits
from autoglm_elastic.coordination._connection import Connection, ServerWatch, SpeaksPlain
from autoglm_elastic.coordination._state import StoreState
from autoglm_elastic.coordination._tls_layer import TlsLayer
from autoglm_elastic.coordination.clock import SystemClock
from autoglm_elastic.coordination.refusals import StoreDenied, StoreRefused
from autoglm_elastic.coordination.tls import Credentials, reason
from autoglm_elastic.errors import PlatformError
from autoglm_elastic.ports import Clock, Compare, Delete, Entry, Json, Put

log = logging.getLogger(__name__)

FLUSH_S_MAX: Final = 1.0
"""How long `close` lets answers and events on their way out leave."""

ACCEPT_PAUSE_S: Final = 0.5
"""After the system refused a new connection (no descriptors left): try again then, do not spin."""

STRANGERS_PER_TURN: Final = 32
"""Connections without a hello that are served before everybody else has had a turn: a handshake costs a millisecond
or two, and a thousand nodes that come back at once, or strangers, must not keep leases from being renewed."""

TELL_S: Final = 1.0
"""Who is turned away is told to the log at most once in so long: strangers must not fill a disk."""

_LISTENER: Final = "listener"
_WAKE: Final = "wake"


class StoreServer:
    """Serves from construction on.

    Args:
        host: address to listen on; "" is every interface.
        port: 0 picks a free one (`address` tells).
        realm: the run this store serves; a client that names another realm is refused. "" serves anyone.
        disconnect_grace_s: how long a bound lease outlives its connection.
        credentials: of ours, and of all clients; None speaks plain.

    Raises:
        PlatformError: the address cannot be listened on (`errno` in `__cause__`).
        UsageError: the certificate is not one for a server.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        realm: str = "",
        disconnect_grace_s: float = limits.DISCONNECT_GRACE_S,
        credentials: Credentials | None = None,
        clock: Clock | None = None,
    ) -> None:
        if credentials is not None:
            credentials.require_server()
        self._credentials = credentials
        self._tell_again_at = 0.0
        self._realm = realm
        self._grace_s = disconnect_grace_s
        self._clock = clock or SystemClock()
        self._identity = uuid.uuid4().hex
        self._state = StoreState()
        self._connections: set[Connection] = set()
        self._pumped_revision = 0
        self._accept_again_at: float | None = None
        self._close_by: float | None = None
        self._listener = _listen(host, port)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, _LISTENER)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, _WAKE)
        self._thread = threading.Thread(target=self._run, name="autoglm-store", daemon=True)
        self._thread.start()

    def close(self, linger_s: float = 0.0) -> None:
        """Stops. With `linger_s` it first serves on until the last client has left, so long at most.
        Idempotent."""
        with contextlib.suppress(OSError):
            self._close_by = self._clock.monotonic() + linger_s
            self._wake_sender.send(b"c")
        self._thread.join(linger_s + 2 * FLUSH_S_MAX)
        self._wake_sender.close()

    # The loop

    def _run(self) -> None:
        try:
            while not self._is_over():
                for key, mask in _in_turn(self._selector.select(self._timeout_s())):
                    if key.data is _LISTENER:
                        self._accept()
                    elif key.data is _WAKE:
                        self._wake_receiver.recv(16)
                    else:
                        self._serve(key.data, mask)
                now = self._clock.monotonic()
                # After the input: a keep-alive that arrived while this process was held up still counts.
                self._state.expire(now)
                self._drop_overdue(now)
                self._pump_watches()
        finally:
            self._shut_down()

    def _is_over(self) -> bool:
        if self._close_by is None:
            return False
        return not self._connections or self._clock.monotonic() >= self._close_by

    def _timeout_s(self) -> float | None:
        deadlines = [at for at in (self._state.next_deadline(), self._close_by, self._accept_again_at) if at]
        deadlines += [each.deadline for each in self._connections if each.deadline]
        return max(0.0, min(deadlines) - self._clock.monotonic()) if deadlines else None

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            self._selector.unregister(self._listener)
            self._accept_again_at = self._clock.monotonic() + ACCEPT_PAUSE_S
            return
        if len(self._connections) >= limits.CONNECTIONS_MAX:
            sock.close()
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        tls = None
        if self._credentials is not None:
            tls = TlsLayer(self._credentials.for_server(), server_side=True)
        connection = Connection(sock, self._clock.monotonic() + limits.HELLO_S_MAX, tls)
        self._connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _serve(self, connection: Connection, mask: int) -> None:
        alive = True
        try:
            if mask & selectors.EVENT_READ:
                alive = connection.receive()
        except SpeaksPlain:
            self._tell(connection, "it does not speak TLS")
            self._refuse(connection, "it speaks TLS only", StoreDenied.code)
        except ssl.SSLError as error:
            self._tell(connection, reason(error))
            connection.finish(b"", self._clock.monotonic() + FLUSH_S_MAX)  # after the alert that says why
        self._answer_frames(connection)
        if connection.flush() and alive:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.has_output else 0)
            self._selector.modify(connection.sock, wanted, connection)
        else:
            self._drop(connection)

    def _answer_frames(self, connection: Connection) -> None:
        try:
            while not connection.closing and (data := connection.next_frame()) is not None:
                if connection.greeted:
                    self._answer(connection, wire.decode_request(data))
                else:
                    self._greet(connection, wire.decode_hello(data))
        except wire.FrameError as error:
            self._refuse(connection, str(error))

    def _greet(self, connection: Connection, hello: wire.Hello) -> None:
        if hello.protocol != wire.PROTOCOL:
            self._refuse(connection, f"this store speaks {wire.PROTOCOL}, not {hello.protocol[:64]!r}")
        elif self._realm and hello.realm and hello.realm != self._realm:
            self._refuse(connection, f"this store serves the run {self._realm!r}, not {hello.realm[:64]!r}")
        else:
            connection.greeted = True
            connection.deadline = None
            connection.send(wire.frame(wire.Hello(wire.PROTOCOL, self._realm, self._identity)))

    def _answer(self, connection: Connection, request: wire.Request) -> None:
        answer: wire.Answer | wire.Refusal
        try:
            answer = wire.Answer(request.id, self._perform(connection, request))
        except StoreRefused as error:
            answer = wire.Refusal(request.id, error.code, str(error))
        try:
            data = wire.frame(answer)
        except wire.FrameError as error:
            data = wire.frame(wire.Refusal(request.id, StoreRefused.code, f"answer too large: {error}"))
        connection.send(data)

    def _perform(self, connection: Connection, request: wire.Request) -> Json:
        state, now = self._state, self._clock.monotonic()
        match request:
            case wire.Get(key=key):
                entry = state.get(key)
                return None if entry is None else _row(entry)
            case wire.GetPrefix(prefix=prefix):
                return [[_row(entry) for entry in state.get_prefix(prefix)], state.revision]
            case wire.Remove(key=key):
                return state.delete(key)
            case wire.Transact(compares=compares, operations=operations):
                done = state.txn(
                    [Compare(key, revision) for key, revision in compares],
                    [_operation(op) for op in operations],
                )
                return [done.outcome.value, done.revision, [_row(entry) for entry in done.entries]]
            case wire.LeaseGrant(ttl_s=ttl_s, bound=bound):
                lease = state.lease_grant(ttl_s, now)
                if bound:
                    connection.leases.add(lease)
                return lease
            case wire.LeaseKeepAlive(lease=lease, bound=bound):
                granted_s = state.lease_keep_alive(lease, now)
                if bound and granted_s:
                    self._bind(lease, connection)
                return granted_s
            case wire.LeaseRevoke(lease=lease):
                return state.lease_revoke(lease)
            case wire.WatchStart(watch=watch, prefix=prefix, from_revision=from_revision):
                if len(connection.watches) >= limits.WATCHES_PER_CONNECTION_MAX:
                    raise StoreRefused(f"more than {limits.WATCHES_PER_CONNECTION_MAX} watches")
                connection.watches[watch] = ServerWatch(prefix, from_revision)
                self._pumped_revision = -1
                return state.revision
            case wire.WatchCancel(watch=watch):
                connection.watches.pop(watch, None)
                return None

    def _bind(self, lease: int, connection: Connection) -> None:
        """The lease follows the client to its newest connection."""
        if lease not in connection.leases:
            for other in self._connections:
                other.leases.discard(lease)
            connection.leases.add(lease)

    # Watches

    def _pump_watches(self) -> None:
        if self._pumped_revision == self._state.revision:
            return
        self._pumped_revision = self._state.revision
        for connection in list(self._connections):
            if connection.watches and not connection.closing:
                self._pump(connection)

    def _pump(self, connection: Connection) -> None:
        try:
            for number, watch in connection.watches.items():
                events, resume = self._state.changes_since(watch.prefix, watch.resume)
                watch.resume = resume
                for data in _frames_of(number, [wire.pack_event(event) for event in events], resume):
                    connection.send(data)
        except wire.FrameError as error:
            self._refuse(connection, str(error))
        self._serve(connection, 0)

    # The ends of connections

    def _refuse(self, connection: Connection, message: str, code: str = StoreRefused.code) -> None:
        refusal = wire.Refusal(0, code, message[:1024])
        connection.finish(wire.frame(refusal), self._clock.monotonic() + FLUSH_S_MAX)

    def _tell(self, connection: Connection, why: str) -> None:
        """Turned away. The client is told, too; here it is for whoever looks into why a node does not join."""
        now = self._clock.monotonic()
        if now >= self._tell_again_at:
            self._tell_again_at = now + TELL_S
            log.warning("turned away from the store: %s: %s", connection.peer, why)

    def _drop_overdue(self, now: float) -> None:
        for connection in [each for each in self._connections if each.deadline and each.deadline <= now]:
            self._drop(connection)
        if self._accept_again_at is not None and now >= self._accept_again_at:
            self._accept_again_at = None
            self._selector.register(self._listener, selectors.EVENT_READ, _LISTENER)

    def _drop(self, connection: Connection) -> None:
        self._connections.discard(connection)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.sock)
        connection.sock.close()
        deadline = self._clock.monotonic() + self._grace_s
        for lease in connection.leases:
            self._state.lease_shorten(lease, deadline)

    def _shut_down(self) -> None:
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.sock.settimeout(FLUSH_S_MAX)
                connection.flush()
            connection.sock.close()
        self._selector.close()
        self._wake_receiver.close()


def _in_turn(ready: list[tuple[selectors.SelectorKey, int]]) -> list[tuple[selectors.SelectorKey, int]]:
    """Strangers last, and not all: the others stay ready."""
    strangers = [each for each in ready if isinstance(each[0].data, Connection) and not each[0].data.greeted]
    if len(strangers) <= 1:
        return ready
    known = [each for each in ready if not isinstance(each[0].data, Connection) or each[0].data.greeted]
    return known + strangers[:STRANGERS_PER_TURN]


def _listen(host: str, port: int) -> socket.socket:
    try:
        if host:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            return _nonblocking(socket.create_server((host, port), family=family, backlog=1024))
        if socket.has_dualstack_ipv6():
            return _nonblocking(
                socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
            )
        return _nonblocking(socket.create_server(("", port), backlog=1024))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PlatformError(f"cannot listen on {host or '*'}:{port}: {reason}") from error


def _nonblocking(listener: socket.socket) -> socket.socket:
    listener.setblocking(False)
    return listener


def _operation(operation: wire.PutOperation | wire.DeleteOperation) -> Put | Delete:
    if isinstance(operation, wire.DeleteOperation):
        return Delete(operation.key)
    return Put(operation.key, operation.value, operation.lease)


def _row(entry: Entry) -> list[Json]:
    return [entry.key, entry.value, entry.create_revision, entry.mod_revision, entry.lease]


def _frames_of(watch: int, events: list[tuple[str, str, Json, int, bool]], resume: int) -> list[bytes]:
    """As few frames as fit. One that ends inside a transaction resumes at it: the client drops what it has
    seen."""
    if not events:
        return []
    try:
        return [wire.frame(wire.Changes(watch, events, resume))]
    except wire.FrameError:
        half = len(events) // 2
        if half == 0:
            raise
        return _frames_of(watch, events[:half], events[half - 1][3]) + _frames_of(
            watch, events[half:], resume
        )
