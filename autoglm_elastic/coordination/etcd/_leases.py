"""How long our leases are good for, also while etcd cannot be asked to renew them.

A lease ends when a leader revokes it, never by itself, and a new leader first gives every lease its whole time again
(etcd `lease.Lessor.Promote`). So, if every voting member, asked after `asked_at`, is dead or not the leader, whoever
leads next was elected after `asked_at`, and no lease that was good until then ends before `asked_at` + its time. That
is as good as a renewal: losing etcd, or electing its leader, does not cost a node its membership.

It is no proof when a member does not answer at all (stopped, or cut off from us), or when the endpoints that we know
are not all members; then a lease that is not renewed is lost, and the node fences itself.
"""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from autoglm_elastic.coordination.etcd._link import Standing
from autoglm_elastic.coordination.etcd._package import etcdrpc
from autoglm_elastic.coordination.etcd._transport import Transport
from autoglm_elastic.coordination.refusals import StoreRefused
from autoglm_elastic.ports import StoreUnavailable

STARTING_S_MAX: Final = 15.0
"""A member that was dead and now accepts connections without answering is starting: it serves once there is a leader.
Taken for one that does not lead for so long."""

ATTEMPT_FRACTION: Final = 0.15
ATTEMPT_S_MIN: Final = 0.1
ATTEMPT_S_MAX: Final = 1.0
"""One attempt to renew, as a part of the lease: a few fit in before the fence."""

LOOK_AGAIN_FRACTION: Final = 0.5
"""Between two looks at all members, as a part of an attempt."""


@dataclass(slots=True)
class _Held:
    ttl_s: int
    good_until: float


class Leases:
    """Those that this process was granted."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._held: dict[int, _Held] = {}
        self._voters: frozenset[int] = frozenset()
        self._lock = threading.Lock()

    def granted(self, lease: int, ttl_s: int, asked_at: float) -> None:
        with self._lock:
            self._held[lease] = _Held(ttl_s, asked_at + ttl_s)

    def forget(self, lease: int) -> None:
        with self._lock:
            self._held.pop(lease, None)

    def learn_members(self) -> None:
        """Who can vote. Kept as it was when nobody answers."""
        try:
            answer = self._transport.call("Cluster.MemberList", etcdrpc.MemberListRequest(), repeatable=True)
        except (StoreUnavailable, StoreRefused):
            return
        self._voters = frozenset(member.ID for member in answer.members)
        advertised = {
            urlsplit(url).netloc: member.ID for member in answer.members for url in member.clientURLs
        }
        wait(self._transport.look(ATTEMPT_S_MAX), 3 * ATTEMPT_S_MAX)  # each tells which member it is
        for link in self._transport.links:
            # One that is down at present is known by the address that it advertises.
            link.member_id = link.member_id or advertised.get(link.where, 0)

    def renew(self, lease: int) -> float:
        """Seconds it is good for from when this was called; 0.0 when it has ended. Raises `StoreUnavailable`."""
        asked_at = self._transport.clock.monotonic()
        held = self._held.get(lease)
        attempt_s = ATTEMPT_S_MAX
        if held is not None:
            attempt_s = min(ATTEMPT_S_MAX, max(ATTEMPT_S_MIN, ATTEMPT_FRACTION * held.ttl_s))
        request = etcdrpc.LeaseKeepAliveRequest(ID=lease)
        try:
            answer: Any = self._transport.call(
                "Lease.LeaseKeepAlive", request, repeatable=True, try_s=attempt_s, once=True
            )
            ttl_s = int(answer.TTL)
        except StoreUnavailable:
            ttl_s = self._ask_everybody(request, held, attempt_s)
        if ttl_s <= 0:
            self.forget(lease)
        elif held is not None:
            held.good_until = asked_at + ttl_s
        return float(ttl_s)

    def _ask_everybody(self, request: Any, held: _Held | None, attempt_s: float) -> int:
        """The first member's answer, or what the standing of all of them proves: looked at again and again until the
        fence, since a slow machine, or members that start or elect, may give neither at first."""
        clock = self._transport.clock
        give_up_at = clock.monotonic() + 4 * attempt_s
        asks = self._transport.ask_everybody("Lease.LeaseKeepAlive", request, 4 * attempt_s)
        looks: list[Future[Standing]] = []
        look_at = clock.monotonic() if held is not None else give_up_at
        pending: set[Future[Any]] = set(asks)
        while pending and (now := clock.monotonic()) < give_up_at:
            if now >= look_at:
                looks = self._transport.look(min(attempt_s, give_up_at - now))
                pending |= set(looks)
                look_at = give_up_at
            done, pending = wait(pending, min(look_at, give_up_at) - now, FIRST_COMPLETED)
            for answer in (each.result(0) for each in asks if each in done):
                if answer is not None:
                    return int(answer.TTL)
            if held is not None and looks and pending.isdisjoint(looks):
                if self._is_good(held, [look.result(0) for look in looks]):
                    return held.ttl_s
                looks = []
                look_at = clock.monotonic() + LOOK_AGAIN_FRACTION * attempt_s
        raise StoreUnavailable(f"etcd at {self._transport.target.address} does not renew leases", sent=False)

    def _is_good(self, held: _Held, found: list[Standing]) -> bool:
        """Whether every voting member was just found dead or not leading, before the lease could end."""
        links, now = self._transport.links, self._transport.clock.monotonic()
        if not {Standing.LEADER, Standing.FOLLOWER} & set(found):
            self._transport.nobody_answers()
        known = bool(self._voters) and self._voters <= {link.member_id for link in links}
        return (
            known
            and now < held.good_until
            and all(
                standing in (Standing.DEAD, Standing.FOLLOWER)
                or (standing is Standing.SILENT and now - link.dead_at < STARTING_S_MAX)
                for link, standing in zip(links, found, strict=True)
            )
        )
