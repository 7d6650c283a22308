"""A `ports.Store` over TCP to a `StoreServer`. Thread safe; one thread reads, and reconnects when it must.

What becomes of a call when the connection breaks: a read, a keep-alive or a revocation is sent again on the
next connection, within the call's own time; any other write that had left fails with
`StoreUnavailable(sent=True)`, because it may have taken effect. Watches resume after the last revision they
delivered; one that cannot gets a `lost` event.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from autoglm_elastic.coordination import _protocol as wire
from autoglm_elastic.coordination import limits
from autoglm_elastic.coordination._channel import Channel, Security
from autoglm_elastic.coordination._client_watch import ClientWatch
from autoglm_elastic.coordination.clock import SystemClock
from autoglm_elastic.coordination.refusals import StoreDenied, StoreRefused, refusal
from autoglm_elastic.coordination.tls import Credentials
from autoglm_elastic.errors import PlatformError
from autoglm_elastic.ports import (
    Clock,
    Compare,
    Delete,
    Entry,
    Json,
    Outcome,
    Put,
    StoreUnavailable,
    Txn,
    WatchEvent,
)

CLOSE_S_MAX: Final = 5.0


class _Call:
    """One request on its way. `repeatable`: doing it twice is as good as once."""

    def __init__(self, request: wire.Request, *, repeatable: bool) -> None:
        self.request = request
        self.repeatable = repeatable
        self.sent = False
        self.done = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None

    def finish(self, result: Any = None, error: Exception | None = None) -> None:
        self.result, self.error = result, error
        self.done.set()


class StoreClient:
    """Connects on construction.

    Args:
        host, port: the server's.
        timeout_s: bound of every call, and of the first connection.
        realm: the run we are of; a server of another run refuses us.
        bind_leases: our leases end soon after our connection does (`limits.DISCONNECT_GRACE_S`): a crash is
        seen at once. on_connection: called from the client's thread with False when the connection is lost
        and True when it is back;
            must not call the store.
        credentials: None speaks plain. peer_name: what the server's certificate must be made out to, where
            `credentials` does not say it; default: `host`.

    Raises:
        StoreUnavailable: nobody answers there within `timeout_s`.
        PlatformError: somebody does, but it is no store of ours, or not of this run.
        StoreDenied: one of us does not accept the other's certificate.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        timeout_s: float = 5.0,
        realm: str = "",
        bind_leases: bool = True,
        on_connection: Callable[[bool], None] | None = None,
        credentials: Credentials | None = None,
        peer_name: str = "",
        clock: Clock | None = None,
    ) -> None:
        self._security: Security | None = None
        if credentials is not None:
            self._security = Security(credentials, credentials.files.server_name or peer_name or host)
        self._address = (host, port)
        self._timeout_s = timeout_s
        self._realm = realm
        self._bind_leases = bind_leases
        self.on_connection = on_connection
        self._clock = clock or SystemClock()
        self._lock = threading.Condition()
        self._numbers = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self._watches: dict[int, ClientWatch] = {}
        self._connected = False
        self._gone = ""
        """Why there will be no connection any more, or ""."""
        self._channel = Channel.open(self._address, timeout_s, realm, self._security)
        self._connected = True
        self._thread = threading.Thread(target=self._run, name="autoglm-store-client", daemon=True)
        self._thread.start()

    @property
    def local_host(self) -> str:
        """The address of this machine that the server sees: one that others can reach, too."""
        return self._channel.local_host

    @property
    def is_connected(self) -> bool:
        return self._connected

    # The port

    def get(self, key: str) -> Entry | None:
        row = self._call(lambda number: wire.Get(number, key), repeatable=True)
        return None if row is None else Entry(*row)

    def get_prefix(self, prefix: str) -> tuple[list[Entry], int]:
        rows, revision = self._call(lambda number: wire.GetPrefix(number, prefix), repeatable=True)
        return [Entry(*row) for row in rows], revision

    def put(self, key: str, value: Json, *, lease: int = 0) -> int:
        return self.txn((), (Put(key, value, lease),)).revision

    def delete(self, key: str) -> bool:
        return bool(self._call(lambda number: wire.Remove(number, key), repeatable=False))

    def txn(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Txn:
        pairs = [(compare.key, compare.mod_revision) for compare in compares]
        packed = [
            wire.PutOperation(each.key, each.value, each.lease)
            if isinstance(each, Put)
            else wire.DeleteOperation(each.key)
            for each in operations
        ]
        outcome, revision, rows = self._call(
            lambda number: wire.Transact(number, pairs, packed), repeatable=False
        )
        return Txn(Outcome(outcome), revision, tuple(Entry(*row) for row in rows))

    def lease_grant(self, ttl_s: float) -> int:
        return int(
            self._call(lambda number: wire.LeaseGrant(number, ttl_s, self._bind_leases), repeatable=False)
        )

    def lease_keep_alive(self, lease: int) -> float:
        return float(
            self._call(lambda number: wire.LeaseKeepAlive(number, lease, self._bind_leases), repeatable=True)
        )

    def lease_revoke(self, lease: int) -> None:
        self._call(lambda number: wire.LeaseRevoke(number, lease), repeatable=True)

    def watch(self, prefix: str, from_revision: int, on_event: Callable[[WatchEvent], None]) -> ClientWatch:
        """`on_event` runs in the client's reading thread: it must not block, nor call the store."""
        with self._lock:
            number = next(self._numbers)
            watch = ClientWatch(prefix, from_revision, on_event, lambda: self._cancel(number))
            self._watches[number] = watch
        try:
            self._call(
                lambda call: wire.WatchStart(call, number, prefix, watch.resume_revision), repeatable=False
            )
        except StoreUnavailable as error:
            if not error.sent:
                with self._lock:
                    self._watches.pop(number, None)
                raise
        except StoreRefused:
            with self._lock:
                self._watches.pop(number, None)
            raise
        return watch

    def close(self) -> None:
        self._end("the client is closed")
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S_MAX)

    # Calls

    def _call(self, make: Callable[[int], wire.Request], *, repeatable: bool) -> Any:
        deadline = self._clock.monotonic() + self._timeout_s
        with self._lock:
            if len(self._calls) >= limits.IN_FLIGHT_MAX:
                raise StoreUnavailable(f"more than {limits.IN_FLIGHT_MAX} requests unanswered", sent=False)
            number = next(self._numbers)
            call = _Call(make(number), repeatable=repeatable)
            try:
                data = wire.frame(call.request)
            except (wire.FrameError, TypeError, ValueError, RecursionError) as error:
                raise StoreRefused(f"request that cannot be sent: {error}") from None
            self._calls[number] = call
            channel = self._wait_connected(call, deadline)
        try:
            if channel is not None:
                self._send(channel, call, data)
            if not call.done.wait(max(0.0, deadline - self._clock.monotonic())):
                raise StoreUnavailable(
                    f"the store at {self._where} did not answer for {self._timeout_s} s", sent=call.sent
                )
        finally:
            with self._lock:
                self._calls.pop(number, None)
        if call.error is not None:
            raise call.error
        return call.result

    def _wait_connected(self, call: _Call, deadline: float) -> Channel | None:
        """The channel to send `call` on; None when the reader has sent it already (it sends all that wait
        when it is connected again), or will not."""
        while not self._connected:
            remaining_s = deadline - self._clock.monotonic()
            if self._gone or remaining_s <= 0:
                call.finish(
                    error=StoreUnavailable(self._gone or f"no store at {self._where}", sent=call.sent)
                )
                return None
            self._lock.wait(remaining_s)
            if call.sent or call.done.is_set():
                return None
        if call.sent:
            return None
        call.sent = True
        return self._channel

    def _send(self, channel: Channel, call: _Call, data: bytes) -> None:
        try:
            channel.send(data)
        except OSError:
            # The reader sees the broken connection, too, and decides about every call that was on it.
            channel.shut()

    @property
    def _where(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

    def _cancel(self, number: int) -> None:
        with self._lock:
            if self._watches.pop(number, None) is None or not self._connected:
                return
            channel = self._channel
        with contextlib.suppress(OSError, StoreUnavailable):
            channel.send(wire.frame(wire.WatchCancel(0, number)))

    def _end(self, why: str) -> None:
        with self._lock:
            self._gone = self._gone or why
            self._connected = False
            for call in self._calls.values():
                call.finish(error=StoreUnavailable(why, sent=call.sent and not call.repeatable))
            self._lock.notify_all()
        self._channel.shut()

    # The reader

    def _run(self) -> None:
        try:
            while True:
                why = self._read_until_broken()
                if not self._note_loss():
                    return
                self._tell(False)
                if not self._reconnect(why):
                    return
                self._tell(True)
        finally:
            # Also when a callback raised: nobody must wait for answers that no thread reads.
            self._end("the client's thread has ended")
            self._channel.close()

    def _read_until_broken(self) -> str:
        while True:
            try:
                message = self._channel.receive()
            except (OSError, wire.FrameError) as error:
                return str(error)
            if isinstance(message, wire.Changes):
                with self._lock:
                    watch = self._watches.get(message.watch)
                if watch is not None:
                    watch.deliver([wire.unpack_event(packed) for packed in message.events], message.resume)
            elif isinstance(message, wire.Hello) or message.id == 0:
                if isinstance(message, wire.Refusal):
                    return message.message
            else:
                self._finish(message)

    def _finish(self, message: wire.Answer | wire.Refusal) -> None:
        with self._lock:
            call = self._calls.get(message.id)
        if call is None:
            return
        if isinstance(message, wire.Answer):
            call.finish(message.result)
        else:
            call.finish(error=refusal(message.code, message.message))

    def _note_loss(self) -> bool:
        with self._lock:
            self._connected = False
            self._fail_unrepeatable()
            return not self._gone

    def _fail_unrepeatable(self) -> None:
        for call in self._calls.values():
            if call.sent and not call.repeatable and not call.done.is_set():
                call.finish(error=StoreUnavailable(f"lost the store at {self._where}", sent=True))

    def _reconnect(self, why: str) -> bool:
        give_up_at = self._clock.monotonic() + limits.RECONNECT_S_MAX
        backoff_s = limits.BACKOFF_S_MIN
        while self._clock.monotonic() < give_up_at:
            try:
                channel = Channel.open(self._address, self._timeout_s, self._realm, self._security)
            except (StoreUnavailable, StoreDenied) as error:
                why = str(error)  # certificates may be about to be rotated: theirs is new, ours is not yet
            except PlatformError as error:
                self._end(str(error))
                return False
            else:
                if self._adopt(channel):
                    return True
            with self._lock:
                if self._gone or self._lock.wait_for(lambda: bool(self._gone), backoff_s):
                    return False
            backoff_s = min(2 * backoff_s, limits.BACKOFF_S_MAX)
        self._end(f"no store at {self._where} for {limits.RECONNECT_S_MAX} s: {why}")
        return False

    def _adopt(self, channel: Channel) -> bool:
        """Makes `channel` the connection: watches resume and waiting calls leave before any new call does."""
        with self._lock:
            if self._gone:
                channel.close()
                return False
            if channel.store != self._channel.store:
                for watch in self._watches.values():
                    watch.restart()
            self._channel.close()
            self._channel = channel
            requests: list[wire.Request] = [
                wire.WatchStart(0, number, watch.prefix, watch.resume_revision)
                for number, watch in self._watches.items()
            ]
            waiting = [call for call in self._calls.values() if not call.done.is_set()]
            for call in waiting:
                call.sent = True
            try:
                for request in requests + [call.request for call in waiting]:
                    channel.send(wire.frame(request))
            except OSError:
                self._fail_unrepeatable()
                return False
            self._connected = True
            self._lock.notify_all()
            return True

    def _tell(self, connected: bool) -> None:
        if self.on_connection is not None and not self._gone:
            self.on_connection(connected)
