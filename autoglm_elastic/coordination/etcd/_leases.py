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
from dataclasses import dataclass
from typing import Any, Final

from autoglm_elastic.coordination.etcd._link import Link, Standing
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
        self._transport.survey(ATTEMPT_S_MAX)

    def renew(self, lease: int) -> float:
        """Seconds it is good for from when this was called; 0.0 when it has ended. Raises `StoreUnavailable`."""
        asked_at = self._transport.clock.monotonic()
        held = self._held.get(lease)
        attempt_s = ATTEMPT_S_MAX
        if held is not None:
            attempt_s = min(ATTEMPT_S_MAX, max(ATTEMPT_S_MIN, ATTEMPT_FRACTION * held.ttl_s))
        try:
            ttl_s = self._ask(lease, attempt_s)
        except StoreUnavailable:
            if held is None or not self._is_good(held, asked_at, attempt_s):
                ttl_s = self._ask(lease, attempt_s)
            else:
                held.good_until = asked_at + held.ttl_s
                return float(held.ttl_s)
        if ttl_s <= 0:
            self.forget(lease)
        elif held is not None:
            held.good_until = asked_at + ttl_s
        return float(ttl_s)

    def _ask(self, lease: int, attempt_s: float) -> int:
        request = etcdrpc.LeaseKeepAliveRequest(ID=lease)
        answer: Any = self._transport.call(
            "Lease.LeaseKeepAlive", request, repeatable=True, try_s=attempt_s, once=True
        )
        return int(answer.TTL)

    def _is_good(self, held: _Held, asked_at: float, attempt_s: float) -> bool:
        links = self._transport.links
        found = self._transport.survey(attempt_s)
        now = self._transport.clock.monotonic()
        if now >= held.good_until or not self._voters:
            return False
        if not self._voters <= {link.member_id for link in links}:
            return False
        return all(
            standing in (Standing.DEAD, Standing.FOLLOWER) or _is_starting(link, asked_at)
            for link, standing in zip(links, found, strict=True)
        )


def _is_starting(link: Link, asked_at: float) -> bool:
    return link.standing is Standing.SILENT and asked_at - link.dead_at < STARTING_S_MAX
