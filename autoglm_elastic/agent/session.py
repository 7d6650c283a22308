"""One node's membership of a run: lease, watch, leadership. The agent's window on everybody else.

Any agent can lead: whoever writes the `leader` key under its lease drives `core.membership`. Nobody polls:
changes come by a watch, timers belong to the leader's machine, waits are on a condition. May touch the store;
must never touch workers (the agent does, on our events) nor the run directory.

Threads: the store's (hands over watch events, nothing else), this session's (applies them, leads), the
lease's two.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

from autoglm_elastic.agent._events import EventQueue, LeaseLost, Sealed, SessionEvent, StoreBack, StoreLost
from autoglm_elastic.agent._keys import Keys
from autoglm_elastic.agent._lease import LeaseKeeper
from autoglm_elastic.agent._session_errors import NotJoined, RunClosed, Superseded, WaitTimeout
from autoglm_elastic.agent._session_loop import SessionLoop
from autoglm_elastic.agent._view import Closed, RunOutcome, View, member_to_json
from autoglm_elastic.coordination import LeaseGone, StoreRefused, SystemClock
from autoglm_elastic.core.membership import Failure, Generation, Member, Policy
from autoglm_elastic.ports import (
    Clock,
    Compare,
    Json,
    Outcome,
    Put,
    Store,
    StoreUnavailable,
)

__all__ = [
    "Closed",
    "LeaseLost",
    "NodeSession",
    "NotJoined",
    "RunClosed",
    "Sealed",
    "SessionEvent",
    "StoreBack",
    "StoreLost",
    "Superseded",
    "WaitTimeout",
]

log = logging.getLogger(__name__)

UNKNOWN_JOINS_MAX: Final = 3
"""Attempts to join whose outcome the store did not tell: each begins anew, with a lease of its own."""

JOIN_ATTEMPTS_MAX: Final = 5
"""Two agents that take the same node's name at once get in each other's way at most so often."""

_T = TypeVar("_T")


class NodeSession:
    """Reads the run's state and watches it from construction on; a member from `join` on. Thread safe.

    Args:
        store: shared by all agents of the run; stays open when the session closes.
        node: this node's name, unique among live agents: a second one with it takes it over.
        host: how others reach this machine.
        nproc: workers this node offers.
        policy: of the run; the leader's counts.
        first_generation: the number of the run's first generation, if the store knows of none.

    Raises:
        StoreUnavailable: the store does not answer.
    """

    def __init__(
        self,
        store: Store,
        *,
        run_id: str,
        node: str,
        host: str,
        nproc: int,
        role: str,
        policy: Policy,
        lease_s: float = 2.0,
        first_generation: int = 1,
        clock: Clock | None = None,
    ) -> None:
        self.store = store
        self.node = node
        self._lease_s = lease_s
        self._clock = clock or SystemClock()
        self._keys = Keys(run_id)
        self._keeper: LeaseKeeper | None = None
        self._lost_lease = 0
        self._joining = threading.Lock()
        self._events = EventQueue()
        self._closed = False
        try:
            self._loop = SessionLoop(
                store,
                self._keys,
                me=Member(node, host, nproc, role, incarnation=0),
                policy=policy,
                first_generation=first_generation,
                events=self._events,
                on_lost=self._lose_lease,
                clock=self._clock,
            )
        except BaseException:
            self._events.close()
            raise

    def tell_progress(self, committed_step: Callable[[], int]) -> None:
        """`committed_step()`: the newest committed step of this node's workers, -1 for none. Asked from a
        thread of the session's when a node is lost: the loss is not charged to a job that makes progress."""
        self._loop.committed_step = committed_step

    # Events

    @property
    def events_fd(self) -> int:
        """Readable while `take_events` would return something. Only to be polled."""
        return self._events.fd

    def take_events(self) -> list[SessionEvent]:
        return self._events.take()

    def connection_changed(self, connected: bool) -> None:
        """For `StoreClient.on_connection`."""
        self._events.push(StoreBack() if connected else StoreLost("lost the connection to the store"))
        if connected:
            self._loop.nudge()

    # Membership

    def join(self) -> None:
        """Become a member, as a new incarnation. Does nothing when already one.

        Raises:
            RunClosed, StoreUnavailable, StoreRefused.
        """
        with self._joining:
            closed = self.outcome()
            if self.is_joined():
                return
            if closed is not None:
                raise RunClosed(closed)
            if self._keeper is not None:
                self._keeper.stop()
            if self._lost_lease:
                # It may still stand in the store, and hold the leadership of our former incarnation.
                self._revoke(self._lost_lease)
            me, lease, granted_at = self._enter()
            self._loop.enlisted(me, lease)
            self._keeper = LeaseKeeper(
                self.store,
                lease,
                lease_s=self._lease_s,
                granted_at=granted_at,
                on_lost=partial(self._lose_lease, lease),
                clock=self._clock,
            )

    def leave(self) -> None:
        """Give up membership and leadership; the others see it at once. Idempotent."""
        with self._joining:
            lease = self._loop.dismissed(self._loop.lease)
            if self._keeper is not None:
                self._keeper.stop()
                self._keeper = None
            if lease:
                self._revoke(lease)

    def close(self) -> None:
        """Leave and stop. Idempotent. The store stays open."""
        self.leave()
        with self._joining:
            if self._closed:
                return
            self._closed = True
        self._loop.stop()
        self._events.close()

    # What is known

    def generation(self) -> Generation | None:
        """The newest sealed one that has been seen."""
        with self._loop.changed:
            return self._loop.view.generation

    def outcome(self) -> Closed | None:
        with self._loop.changed:
            return self._loop.view.closed

    def returns(self) -> bool:
        """Whether nodes have finished because the job was stopped, and wants to be started again."""
        with self._loop.changed:
            return self._loop.view.returning

    def is_joined(self) -> bool:
        with self._loop.changed:
            return bool(self._loop.lease)

    @property
    def incarnation(self) -> int:
        """Of this node's membership; generations that place it name the same one. 0: no member."""
        with self._loop.changed:
            return self._loop.me.incarnation if self._loop.lease else 0

    def is_leader(self) -> bool:
        with self._loop.changed:
            return self._loop.leader is not None

    def members(self) -> dict[str, Member]:
        """Live nodes by name, in order of arrival."""
        with self._loop.changed:
            return dict(self._loop.view.members)

    def waiting(self) -> int:
        """Live nodes that the newest generation does not count on; those that have finished do not wait."""
        with self._loop.changed:
            generation, view = self._loop.view.generation, self._loop.view
            if generation is None:
                return len(view.members)
            placed = {place.node: place.incarnation for place in generation.placements}
            return sum(
                placed.get(node) != member.incarnation and not view.has_finished(node)
                for node, member in view.members.items()
            )

    # What this node says

    def report_broken(self, generation: int, failure: Failure, alive_s: float) -> None:
        """A worker of this node died in `generation`, which had run here for `alive_s` seconds. Ignored when
        a newer generation is sealed that did not only grow from it: it is being repaired already."""
        if not self._is_over(generation):
            report = {"failure": failure.to_json(), "alive_s": alive_s}
            self.store.put(self._keys.broken(generation, self.node), report)

    def report_finished(self, generation: int, *, returns: bool = False) -> None:
        """All workers of this node ended well in `generation`; `returns`: on an agreed stop, to be started again."""
        if not self._is_over(generation):
            report = {"wall_time": self._clock.wall(), "returns": returns}
            self.store.put(self._keys.finished(generation, self.node), report)

    def report_entered(self, generation: int) -> None:
        """This node has seen `generation` and puts its workers into it: it was alive when that was sealed. See
        `wait_entered`."""
        self.store.put(self._keys.entered(generation, self.node), {})

    def leave_note(self, note: Json) -> None:
        """For who looks at the job from outside (`onlooker`); it ends with this node's lease, and no agent is woken by
        it. Nothing for a node that is no member. Raises StoreUnavailable, StoreRefused."""
        with self._loop.changed:
            lease = self._loop.lease
        if lease:
            self.store.put(self._keys.note(self.node), note, lease=lease)

    def publish_c10d(self, generation: int, host: str, port: int) -> None:
        """Where the workers of `generation` find their c10d store. Ends with this node's lease.

        Raises:
            Superseded: it is not the newest generation; nothing was written.
        """
        with self._loop.changed:
            revision, lease = self._loop.view.generation_revision, self._loop.lease
            newest = self._loop.view.generation
        if newest is not None and newest.number == generation:
            if not lease:
                raise NotJoined(f"node {self.node} is no member of the run")
            try:
                done = self.store.txn(
                    (Compare(self._keys.generation, revision),),
                    (Put(self._keys.c10d(generation), {"host": host, "port": port}, lease),),
                )
            except LeaseGone:
                raise NotJoined(f"node {self.node} has lost its lease") from None
            if done.outcome is Outcome.OK:
                return
        raise Superseded(generation)

    def close_run(self, outcome: RunOutcome, reason: str, first_failure: Failure | None = None) -> None:
        """End the run for everybody, unless it has ended already: the first word stands."""
        closed = Closed(outcome, reason, first_failure)
        self.store.txn((Compare(self._keys.closed, 0),), (Put(self._keys.closed, closed.to_json()),))

    # Waits: bounded, woken by the watch

    def wait_sealed(self, after: int, timeout_s: float) -> Generation:
        """The newest generation, once its number is greater than `after`. Raises RunClosed, NotJoined,
        WaitTimeout."""

        def sealed(view: View) -> Generation | None:
            newest = view.generation
            return newest if newest is not None and newest.number > after else None

        return self._wait(sealed, timeout_s, f"no generation after {after} was sealed")

    def wait_c10d(self, generation: int, timeout_s: float) -> tuple[str, int]:
        """Raises Superseded, RunClosed, NotJoined, WaitTimeout."""
        return self._wait(
            lambda view: view.c10d.get(generation),
            timeout_s,
            f"the first node of generation {generation} did not publish its c10d store",
            generation,
        )

    def wait_entered(self, generation: Generation, timeout_s: float) -> None:
        """Until every node of `generation` has called `report_entered`: whoever starts workers before may
        wait in vain for a node that died meanwhile. Raises Superseded, RunClosed, NotJoined, WaitTimeout."""
        nodes = {(generation.number, place.node) for place in generation.placements}
        self._wait(
            lambda view: nodes <= view.entered or None,
            timeout_s,
            f"not every node entered generation {generation.number}",
            generation.number,
        )

    def wait_finished(self, generation: int, timeout_s: float) -> bool:
        """Whether every node of `generation` has reported that it finished, or the run is done; False after
        `timeout_s`. Raises Superseded, RunClosed (failed), NotJoined."""

        def finished(view: View) -> bool | None:
            if view.closed is not None and view.closed.outcome == "done":
                return True
            newest = view.generation
            if newest is None or newest.number != generation:
                return None
            return all((generation, place.node) in view.finished for place in newest.placements) or None

        try:
            return self._wait(finished, timeout_s, "", generation)
        except WaitTimeout:
            return False

    def _wait(
        self,
        found: Callable[[View], _T | None],
        timeout_s: float,
        missing: str,
        generation: int | None = None,
    ) -> _T:
        deadline = self._clock.monotonic() + timeout_s
        with self._loop.changed:
            while True:
                value = found(self._loop.view)
                if value is not None:
                    return value
                if self._loop.view.closed is not None:
                    raise RunClosed(self._loop.view.closed)
                newest = self._loop.view.generation
                if generation is not None and newest is not None and newest.number > generation:
                    raise Superseded(generation)
                if not self._loop.lease:
                    raise NotJoined(f"node {self.node} is no member of the run")
                remaining_s = deadline - self._clock.monotonic()
                if remaining_s <= 0:
                    raise WaitTimeout(f"{missing} within {timeout_s:g} s")
                self._loop.changed.wait(remaining_s)

    # Inside

    def _enter(self) -> tuple[Member, int, float]:
        """A lease, this node's key under it, and when the lease was asked for."""
        for attempt in range(UNKNOWN_JOINS_MAX):
            granted_at = self._clock.monotonic()
            lease = self.store.lease_grant(self._lease_s)
            try:
                return self._enlist(lease), lease, granted_at
            except StoreUnavailable as error:
                self._revoke(lease)
                if not error.sent or attempt + 1 == UNKNOWN_JOINS_MAX:
                    raise
            except BaseException:
                self._revoke(lease)
                raise
        raise NotJoined("no attempt to join was made")

    def _enlist(self, lease: int) -> Member:
        """Write this node's key as a new incarnation under `lease`."""
        key, me = self._keys.member(self.node), self._loop.me
        for _ in range(JOIN_ATTEMPTS_MAX):
            present = self.store.get(key)
            # The store's revision grows with every incarnation's own write.
            incarnation = self.store.txn((), ()).revision + 1
            me = replace(me, incarnation=incarnation)
            done = self.store.txn(
                (Compare(key, 0 if present is None else present.mod_revision),),
                (Put(key, member_to_json(me), lease),),
            )
            if done.outcome is Outcome.OK:
                return me
        raise NotJoined(
            f"the node name {self.node!r} is being taken by other agents, too",
            do="give every agent its own node name",
        )

    def _lose_lease(self, lease: int, reason: str) -> None:
        if self._loop.dismissed(lease):
            self._lost_lease = lease
            self._events.push(LeaseLost(reason))

    def _revoke(self, lease: int) -> None:
        try:
            self.store.lease_revoke(lease)
        except (StoreUnavailable, StoreRefused) as error:
            log.info("lease %d is left to expire: %s", lease, error)

    def _is_over(self, generation: int) -> bool:
        """Whether nobody asks for news of `generation` any more: a newer one is sealed, and did not only grow."""
        newest = self.generation()
        return newest is not None and newest.number > generation and newest.nodes_of(generation) is None
