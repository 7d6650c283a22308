"""One watch on etcd: a thread that follows a stream, resumes it at another member when it falls silent or ends, and
hands every change over once and in order.

A stream cannot tell a member that has nothing to say from one that was stopped, so it is asked for a sign of
life. That sign's revision is not used for resuming: before etcd 3.4.25 it can be ahead of the events.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from autoglm_elastic.coordination import limits
from autoglm_elastic.coordination._client_watch import ClientWatch
from autoglm_elastic.coordination.etcd._errors import Meaning, is_silence, meaning
from autoglm_elastic.coordination.etcd._link import Link
from autoglm_elastic.coordination.etcd._package import etcdrpc, grpc, utils
from autoglm_elastic.coordination.etcd._transport import Transport
from autoglm_elastic.coordination.refusals import StoreRefused
from autoglm_elastic.ports import EventKind, Json, StoreUnavailable, WatchEvent

PING_S: Final = 1.0
SILENCE_S: Final = 3.0
"""A stream that has said nothing for so long, though asked, is dead. (A call that fails at the same member ends
it sooner: `suspect`.)"""

SHORT_S: Final = 1.0
"""A stream that ends sooner counts as a failed attempt: the next ones are put off."""

JOIN_S_MAX: Final = 2.0


class EtcdWatch:
    """`ports.Watch`. `on_end(watch)`: it will not go on."""

    def __init__(
        self,
        transport: Transport,
        prefix: str,
        from_revision: int,
        on_event: Callable[[WatchEvent], None],
        on_end: Callable[[EtcdWatch], None],
    ) -> None:
        self._transport = transport
        self._on_end = on_end
        self._delivery = ClientWatch(prefix, from_revision, on_event, self._wake)
        self._over = threading.Event()
        self._link: Link | None = None
        self._call: Any = None
        self._heard_at = 0.0
        self._thread = threading.Thread(target=self._run, name="autoglm-etcd-watch", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        self._delivery.cancel()

    def close(self) -> None:
        """As `cancel`, and waits for the thread."""
        self.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_S_MAX)

    def suspect(self, link: Link) -> None:
        """`link` has failed a call: if this stream is on it, resume elsewhere."""
        call = self._call
        if self._link is link and call is not None:
            call.cancel()

    def _wake(self) -> None:
        self._over.set()
        if self._call is not None:
            self._call.cancel()
        self._on_end(self)

    def _is_over(self) -> bool:
        return self._over.is_set() or self._transport.closing.is_set()

    def _run(self) -> None:
        try:
            clock, members, failures = self._transport.clock, len(self._transport.links), 0
            while not self._is_over():
                began = clock.monotonic()
                self._follow(self._transport.link())
                failures = 0 if clock.monotonic() - began > SHORT_S else failures + 1
                if failures >= members:
                    pause_s = limits.BACKOFF_S_MIN * 2 ** min(failures // members, 8)
                    self._over.wait(min(pause_s, limits.BACKOFF_S_MAX))
        finally:
            if not self._is_over():
                # A callback has raised: a store whose watches are dead must not look alive.
                self._transport.close()
            self._on_end(self)

    def _follow(self, link: Link) -> None:
        """One stream, to its end."""
        came_up = False
        try:
            if self._is_behind():
                self._delivery.restart()
            self._heard_at = self._transport.clock.monotonic()
            self._transport.operations["Watch.Watch"] += 1
            ended = threading.Event()
            metadata = self._transport.metadata(link)
            call = link.method("Watch.Watch")(self._requests(ended), metadata=metadata)
            self._link, self._call = link, call
            try:
                for answer in call:
                    self._heard_at = self._transport.clock.monotonic()
                    self._transport.heard(link, answer)
                    came_up = True
                    if not self._take(answer) or self._is_over():
                        return
            finally:
                ended.set()
                self._call = None
                call.cancel()
        except grpc.RpcError as error:
            if meaning(error) is Meaning.LOGIN:
                self._transport.forget_token()
            elif is_silence(error) or not came_up:
                self._transport.doubt(link)
        except (StoreUnavailable, StoreRefused):
            self._transport.doubt(link)
        except ValueError:
            # grpc's word for a channel that is closed.
            if not self._is_over():
                raise

    def _requests(self, ended: threading.Event) -> Iterator[Any]:
        """Runs in a thread of grpc's: opens the watch, then asks for signs of life."""
        prefix = self._delivery.prefix.encode()
        create = etcdrpc.WatchCreateRequest(
            key=prefix,
            range_end=utils.increment_last_byte(prefix),
            start_revision=max(1, self._delivery.resume_revision),
        )
        yield etcdrpc.WatchRequest(create_request=create)
        while not ended.wait(PING_S) and not self._is_over():
            if self._transport.clock.monotonic() - self._heard_at > SILENCE_S:
                call = self._call
                if call is not None:
                    call.cancel()
                return
            yield etcdrpc.WatchRequest(progress_request=etcdrpc.WatchProgressRequest())

    def _take(self, answer: Any) -> bool:
        """Hands over what one answer brings. Whether the stream goes on."""
        if answer.compact_revision:
            self._lose()
            return False
        if answer.canceled:
            self._transport.forget_token()
            return False
        if answer.events:
            events = [_event(each) for each in answer.events]
            self._delivery.deliver(events, events[-1].revision + 1)
        return True

    def _lose(self) -> None:
        revision = self._present_revision()
        event = WatchEvent(EventKind.DELETE, self._delivery.prefix, None, revision, lost=True)
        self._delivery.deliver([event], revision + 1)

    def _is_behind(self) -> bool:
        """Whether etcd has begun anew, with fewer revisions than we have seen: asked before a watch resumes."""
        seen = self._delivery.seen_revision
        return seen > 0 and self._present_revision() < seen

    def _present_revision(self) -> int:
        request = etcdrpc.RangeRequest(key=self._delivery.prefix.encode(), count_only=True)
        return int(self._transport.call("KV.Range", request, repeatable=True).header.revision)


def _event(packed: Any) -> WatchEvent:
    key = packed.kv.key.decode(errors="replace")
    if packed.type == etcdrpc.Event.DELETE:
        return WatchEvent(EventKind.DELETE, key, None, packed.kv.mod_revision)
    return WatchEvent(EventKind.PUT, key, from_json(packed.kv.value), packed.kv.mod_revision)


def from_json(data: bytes) -> Json:
    """None for what is no JSON: some other program wrote it."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
