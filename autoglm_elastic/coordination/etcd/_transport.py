"""Calls to a cluster of etcd members: each bounded, sent elsewhere when a member is dead or stopped, counted.

One channel a member; calls go to the member that answered last, until it does not. Whether an error leaves
the outcome open is decided here, by `_errors.meaning`: what may have been done and must not be done twice is
never sent again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from autoglm_elastic.coordination import limits
from autoglm_elastic.coordination.etcd._errors import Meaning, details, is_silence, meaning
from autoglm_elastic.coordination.etcd._link import Link, Standing
from autoglm_elastic.coordination.etcd._package import etcdrpc, grpc
from autoglm_elastic.coordination.etcd.target import EtcdTarget
from autoglm_elastic.coordination.refusals import LeaseGone, StoreDenied, StoreRefused
from autoglm_elastic.ports import Clock, StoreUnavailable

TRY_S: Final = 1.0
"""One attempt of a call that may be repeated: a stopped member costs so much, once."""

WRITE_S: Final = 2.0
"""One attempt of a write; past it, its outcome is unknown."""

FRESH_S: Final = 1.0
"""A member that answered so recently is taken to be alive. Another is asked before a write goes to it, so that
writes do not end as unknown in a member that stopped long ago."""

PROBE_S: Final = 0.5

_NEEDS_LEADER: Final = ("hasleader", "true")
"""A member that is cut off from the others says so instead of keeping us waiting."""


_DENIALS: Final = (
    ("user name is empty", "give USER@ in the address, and its password (docs/etcd.md)"),
    ("authentication is not enabled", "leave USER@ out of the address, or enable etcd's auth"),
    ("authentication failed", "check the user, and password_file or AUTOGLM_ETCD_PASSWORD"),
    ("permission denied", "give the user a role that may read and write /autoglm/ (docs/etcd.md)"),
    ("", "check user, password, certificate and the user's roles"),
)
"""What etcd says to whom it does not let in, and what to do; "" stands for every other word about a login."""


class Compacted(Exception):
    """The revision that was asked for is not kept any more."""


class Transport:
    """`on_connection(connected)`: called when a call gave up on every member, and when one answers again.
    `on_doubt(link)`: `link` did not answer. `operations`: requests sent, by name."""

    def __init__(self, target: EtcdTarget, *, timeout_s: float, clock: Clock) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self.clock = clock
        self.operations: Counter[str] = Counter()
        self.on_connection: Callable[[bool], None] | None = None
        self.on_doubt: Callable[[Link], None] = lambda _: None
        self.is_connected = True
        self.closing = threading.Event()
        self.links = [Link(host, port, target) for host, port in target.endpoints]
        self._current = 0
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        self._password = target.password()
        self._token = ""
        self._pool = ThreadPoolExecutor(4 * len(self.links), "autoglm-etcd-ask")

    # Calls

    def call(
        self,
        name: str,
        request: Any,
        *,
        repeatable: bool,
        try_s: float = TRY_S,
        once: bool = False,
    ) -> Any:
        """The answer to `request` of method `name` ("KV.Range").

        Args:
            repeatable: doing it twice is as good as once.
            try_s: bound of one attempt; of a write it is `WRITE_S`.
            once: one attempt, whoever it is that does not answer.

        Raises:
            StoreUnavailable, StoreRefused, LeaseGone, Compacted.
        """
        deadline = self.clock.monotonic() + (try_s if once else self.timeout_s)
        failures, logins, why = 0, 0, "no time"
        while True:
            remaining_s = deadline - self.clock.monotonic()
            if self.closing.is_set():
                raise StoreUnavailable("the store is closed", sent=False)
            if remaining_s <= 0 or (once and failures):
                if not once:
                    self._tell(False)
                raise StoreUnavailable(f"etcd at {self.target.address} does not answer: {why}", sent=False)
            link = self.link()
            try:
                if not repeatable and not self._answers(link, min(PROBE_S, remaining_s)):
                    why = f"{link.where}: no answer"
                else:
                    bound_s = min(remaining_s, try_s if repeatable else WRITE_S)
                    answer = self._send(link, name, request, bound_s)
                    if answer is not None:
                        self.heard(link, answer)
                        return answer
                    why = f"{link.where}: it ended the stream"
            except grpc.RpcError as error:
                why = f"{link.where}: {details(error)}"
                if not is_silence(error):
                    link.answered_at = self.clock.monotonic()
                what = meaning(error)
                if what is Meaning.LOGIN and logins < len(self.links):
                    logins += 1
                    self._token = ""
                    continue
                if what is Meaning.UNKNOWN and not repeatable:
                    self.doubt(link)
                    raise StoreUnavailable(
                        f"etcd did not say what became of {name}: {why}", sent=True
                    ) from error
                if what not in (Meaning.UNKNOWN, Meaning.ELSEWHERE):
                    raise _refusal(what, name, error, self.target) from error
            except ValueError as error:
                # grpc's word for a channel that is closed.
                if self.closing.is_set():
                    raise StoreUnavailable("the store is closed", sent=not repeatable) from error
                raise
            self.doubt(link)
            failures += 1
            if failures % len(self.links) == 0 and not once:
                # Every member has failed: nothing tells when one is back.
                pause_s = min(
                    limits.BACKOFF_S_MAX, limits.BACKOFF_S_MIN * 2 ** min(failures // len(self.links), 8)
                )
                self.closing.wait(min(pause_s, max(0.0, deadline - self.clock.monotonic())))

    def metadata(self, link: Link) -> tuple[tuple[str, str], ...]:
        """What every request carries. Raises as a call does."""
        if not self.target.user:
            return (_NEEDS_LEADER,)
        with self._lock:
            token = self._token
        if not token:
            self.operations["Auth.Authenticate"] += 1
            request = etcdrpc.AuthenticateRequest(name=self.target.user, password=self._password)
            token = link.method("Auth.Authenticate")(request, timeout=TRY_S).token
            with self._lock:
                self._token = token
        return (_NEEDS_LEADER, ("token", token))

    def forget_token(self) -> None:
        with self._lock:
            self._token = ""

    def _send(self, link: Link, name: str, request: Any, timeout_s: float) -> Any:
        method, metadata = link.method(name), self.metadata(link)
        self.operations[name] += 1
        if name != "Lease.LeaseKeepAlive":
            return method(request, timeout=timeout_s, metadata=metadata)
        call = method(iter((request,)), timeout=timeout_s, metadata=metadata)
        try:
            return next(iter(call), None)
        finally:
            call.cancel()

    # Members

    def link(self) -> Link:
        """The member to ask next."""
        with self._lock:
            return self.links[self._current]

    def heard(self, link: Link, answer: Any = None) -> None:
        """`link` has answered."""
        link.answered_at = self.clock.monotonic()
        if answer is not None and answer.header.member_id:
            link.member_id = answer.header.member_id
        self._tell(True)

    def doubt(self, link: Link) -> None:
        """`link` did not do what was asked: ask the next one from now on."""
        with self._lock:
            if self.links[self._current] is not link:
                return
            self._current = (self._current + 1) % len(self.links)
        link.answered_at = float("-inf")
        self.on_doubt(link)

    def look(self, link: Link, timeout_s: float) -> Future[Standing]:
        """What a member is now. Raises `StoreUnavailable` when closed."""
        self.operations["Maintenance.Status"] += 1
        return self._submit(link.look, timeout_s, self.clock.monotonic())

    def ask(self, link: Link, name: str, request: Any, timeout_s: float) -> Future[Any]:
        """One attempt, at this member, of a call that may be repeated; None when it fails.

        Raises:
            StoreUnavailable: closed.
        """

        def work() -> Any:
            try:
                answer = self._send(link, name, request, timeout_s)
            except (grpc.RpcError, ValueError):
                return None
            if answer is not None:
                self.heard(link, answer)
                self._prefer(link)
            return answer

        return self._submit(work)

    def nobody_answers(self) -> None:
        self._tell(False)

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        try:
            return self._pool.submit(function, *arguments)
        except RuntimeError as error:
            raise StoreUnavailable("the store is closed", sent=False) from error

    def _prefer(self, link: Link) -> None:
        with self._lock:
            self._current = self.links.index(link)

    def _answers(self, link: Link, timeout_s: float) -> bool:
        if self.clock.monotonic() - link.answered_at < FRESH_S:
            return True
        self.operations["Maintenance.Status"] += 1
        if link.is_alive(timeout_s, self.metadata(link)):
            link.answered_at = self.clock.monotonic()
            return True
        return False

    # Connection

    def _tell(self, connected: bool) -> None:
        if self.is_connected == connected or self.closing.is_set():
            return
        with self._telling:
            if self.is_connected != connected:
                self.is_connected = connected
                if self.on_connection is not None:
                    self.on_connection(connected)

    def close(self) -> None:
        self.closing.set()
        for link in self.links:
            link.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _refusal(what: Meaning, name: str, error: Any, target: EtcdTarget) -> Exception:
    text = details(error).removeprefix("etcdserver: ")
    if what is Meaning.LEASE_GONE:
        return LeaseGone(f"etcd: {text}")
    if what is Meaning.COMPACTED:
        return Compacted(text)
    whom = f"user {target.user}" if target.user else "us without a user"
    for words, cure in _DENIALS:
        if words in text or (what is Meaning.LOGIN and not words):
            return StoreDenied(f"etcd at {target.address} denies {whom} {name}: {text}", do=cure)
    return StoreRefused(f"etcd refuses {name}: {text}")
