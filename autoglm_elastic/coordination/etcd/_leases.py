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
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from autoglm_elastic.coordination.etcd._link import Link, Standing
from autoglm_elastic.coordination.etcd._package import etcdrpc
from autoglm_elastic.coordination.etcd._transport import Transport
from autoglm_elastic.coordination.refusals import StoreRefused
from autoglm_elastic.ports import StoreUnavailable

STARTING_S_MAX: Final = 15.0
"""A member that was dead and now accepts connections without answering is starting: it serves once there is a leader.
Taken for one that does not lead for so long."""

KEEP_ALIVE: Final = "Lease.LeaseKeepAlive"

ATTEMPT_FRACTION: Final = 0.15
ATTEMPT_S_MIN: Final = 0.1
ATTEMPT_S_MAX: Final = 1.0
"""One attempt to renew, as a part of the lease: a few fit in before the fence."""

ROUND: Final = 2.6
"""All members together are asked for so many attempts: until just before the fence, so that it can say why."""

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
        looks = [self._transport.look(link, ATTEMPT_S_MAX) for link in self._transport.links]
        wait(looks, 3 * ATTEMPT_S_MAX)  # each tells which member it is
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
                KEEP_ALIVE, request, repeatable=True, try_s=attempt_s, once=True
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
        """The first member's answer, or what the standing of all of them proves.

        Each is looked at again and again until the fence, since a slow machine, or members that start or elect, may
        give neither at first. Whoever is found to lead is asked anew: what a follower has passed on to a leader that
        stopped is not answered.
        """
        transport, clock = self._transport, self._transport.clock
        give_up_at = clock.monotonic() + ROUND * attempt_s
        asks = {transport.ask(link, KEEP_ALIVE, request, ROUND * attempt_s) for link in transport.links}
        looks: dict[Future[Standing], Link] = {}
        look_at = dict.fromkeys(transport.links, 0.0) if held is not None else {}
        seen = _Seen(transport.links)
        while (asks or looks or look_at) and (now := clock.monotonic()) < give_up_at:
            for link in [link for link, at in look_at.items() if at <= now]:
                del look_at[link]
                looks[transport.look(link, min(attempt_s, give_up_at - now))] = link
            pause_s = min([give_up_at, *look_at.values()]) - now
            if not asks and not looks:
                transport.closing.wait(pause_s)
                continue
            done, _ = wait([*asks, *looks], pause_s, FIRST_COMPLETED)
            for ask in done & asks:
                asks.remove(ask)
                if (answer := ask.result(0)) is not None:
                    return int(answer.TTL)
            for look in done & looks.keys():
                link, now = looks.pop(look), clock.monotonic()
                look_at[link] = now + LOOK_AGAIN_FRACTION * attempt_s
                if seen.note(link, look.result(0), now) is Standing.LEADER:
                    asks.add(transport.ask(link, KEEP_ALIVE, request, give_up_at - now))
            if seen.nobody:
                transport.nobody_answers()
            if held is not None and seen.no_leader and self._knows_all() and now < held.good_until:
                return held.ttl_s
        raise StoreUnavailable(f"etcd does not renew leases ({seen})", sent=False)

    def _knows_all(self) -> bool:
        """Whether every member that votes is one of our endpoints."""
        return bool(self._voters) and self._voters <= {link.member_id for link in self._transport.links}


class _Seen:
    """What the members were found to be since a renewal was asked for."""

    def __init__(self, links: Sequence[Link]) -> None:
        self._found: dict[Link, Standing | None] = dict.fromkeys(links)
        self._not_leading: set[Link] = set()
        """Once is enough: if it leads later, it was elected later."""

    def note(self, link: Link, standing: Standing, now: float) -> Standing:
        self._found[link] = standing
        starting = standing is Standing.SILENT and now - link.dead_at < STARTING_S_MAX
        if starting or standing in (Standing.DEAD, Standing.FOLLOWER):
            self._not_leading.add(link)
        return standing

    @property
    def no_leader(self) -> bool:
        """Whether no lease that was good when it was asked for can end before its whole time from then."""
        return len(self._not_leading) == len(self._found)

    @property
    def nobody(self) -> bool:
        """Each was looked at, and none answers."""
        return all(each in (Standing.DEAD, Standing.SILENT) for each in self._found.values())

    def __str__(self) -> str:
        return "; ".join(
            f"{link.where}: {'not seen' if standing is None else standing.value}"
            for link, standing in self._found.items()
        )
