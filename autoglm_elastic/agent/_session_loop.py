"""The session's own thread: applies what the watch brings to the view, and leads the run when it is this
node's turn.

The view is changed by this thread only; everybody may read it under `changed`, which is notified after every
change. No store call is made while `changed` is held: the store's thread needs it to hand over events.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from autoglm_elastic.agent._events import EventQueue, Sealed
from autoglm_elastic.agent._keys import Keys
from autoglm_elastic.agent._leader import Deposed, Leader
from autoglm_elastic.agent._view import Leadership, View
from autoglm_elastic.coordination import StoreRefused
from autoglm_elastic.core.membership import Member, Policy
from autoglm_elastic.ports import Clock, Compare, Outcome, Put, Store, StoreUnavailable, WatchEvent

log = logging.getLogger(__name__)

INBOX_MAX: Final = 1 << 16
"""Watch events not applied yet; beyond it they are dropped and everything is read again."""

RETRY_S: Final = 0.25
"""After the store failed this thread: look again then, or when the connection is back."""

STOP_S_MAX: Final = 10.0


class SessionLoop:
    """`me` and `lease` (0: no member) are set by `enlisted` and `dismissed`. `on_lost(lease, reason)` is
    called from the thread when another agent has taken this node's name, or when the thread itself fails.

    Raises (construction): StoreUnavailable.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        *,
        me: Member,
        policy: Policy,
        first_generation: int,
        events: EventQueue,
        on_lost: Callable[[int, str], None],
        clock: Clock,
    ) -> None:
        self._store = store
        self._keys = keys
        self._policy = policy
        self._first_generation = first_generation
        self._events = events
        self._on_lost = on_lost
        self._clock = clock
        self.changed = threading.Condition()
        self.view = View(keys)
        self.me = me
        self.lease = 0
        self.leader: Leader | None = None
        self.committed_step: Callable[[], int] = lambda: -1
        self._inbox: deque[WatchEvent] = deque()
        self._stale = False
        """The view missed something: read everything again."""
        self._nudged = False
        """Something other than a watch event wants the thread to look."""
        self._retry_at: float | None = None
        self._stopping = False
        self._told_generation = -1
        self._told_closed = False
        entries, revision = store.get_prefix(keys.prefix)
        self.view.load(entries)
        self._tell()
        self._watch = store.watch(keys.prefix, revision + 1, self._receive)
        self._thread = threading.Thread(target=self._run, name="autoglm-session", daemon=True)
        self._thread.start()

    def enlisted(self, me: Member, lease: int) -> None:
        with self.changed:
            self.me, self.lease = me, lease
            self._nudged = True
            self.changed.notify_all()

    def dismissed(self, lease: int) -> int:
        """No member and no leader from now on, if it was by `lease`. Returns that lease, or 0 when it was
        not."""
        with self.changed:
            if self.lease != lease:
                return 0
            self.lease, self.leader = 0, None
            self.changed.notify_all()
            return lease

    def nudge(self) -> None:
        with self.changed:
            self._nudged = True
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self._stopping = True
            self.changed.notify_all()
        self._watch.cancel()
        self._thread.join(STOP_S_MAX)

    def _receive(self, event: WatchEvent) -> None:
        with self.changed:
            if event.lost or len(self._inbox) >= INBOX_MAX:
                self._inbox.clear()
                self._stale = True
            elif not self._stale:
                self._inbox.append(event)
            self.changed.notify_all()

    def _run(self) -> None:
        while self._await_work():
            try:
                self._work()
                self._retry_at = None
            except Deposed:
                self._give_up_leading()
            except (StoreUnavailable, StoreRefused) as error:
                # What became of the last effect is unknown: read everything, and lead on from there if it is
                # still our turn.
                log.info("the store failed the session, trying again: %s", error)
                self._give_up_leading()
                self._retry_at = self._clock.monotonic() + RETRY_S
            except Exception as error:
                # Without this thread the node is blind: better out of the run than following nothing.
                self._on_lost(self.lease, f"the session failed: {type(error).__name__}: {error}")
                raise

    def _await_work(self) -> bool:
        with self.changed:
            while not (self._stopping or self._inbox or self._nudged or (self._stale and not self._retry_at)):
                deadlines = [at for at in (self._retry_at, self.leader and self.leader.deadline) if at]
                remaining_s = min(deadlines) - self._clock.monotonic() if deadlines else None
                if remaining_s is not None and remaining_s <= 0:
                    break
                self.changed.wait(remaining_s)
            self._nudged = False
            return not self._stopping

    def _give_up_leading(self) -> None:
        with self.changed:
            self.leader = None
            self._stale = True

    def _work(self) -> None:
        with self.changed:
            stale = self._stale
        if stale:
            self._read_everything()
        while (event := self._next_event()) is not None:
            self._apply(event)
        self._lead()

    def _next_event(self) -> WatchEvent | None:
        with self.changed:
            return self._inbox.popleft() if self._inbox and not self._stale else None

    def _read_everything(self) -> None:
        with self.changed:
            self._stale = False
            self.leader = None
        try:
            entries, revision = self._store.get_prefix(self._keys.prefix)
        except BaseException:
            with self.changed:
                self._stale = True
            raise
        with self.changed:
            while self._inbox and self._inbox[0].revision <= revision:
                self._inbox.popleft()
            self.view.load(entries)
            self.changed.notify_all()
        self._tell()

    def _apply(self, event: WatchEvent) -> None:
        with self.changed:
            meaning = self.view.apply(event, self._clock.monotonic())
            leader = self.leader
            self.changed.notify_all()
        self._tell()
        if leader is not None and meaning is not None:
            leader.feed(self.view, meaning)

    def _tell(self) -> None:
        """Events for the agent out of what the view shows now, each once."""
        generation, closed = self.view.generation, self.view.closed
        if generation is not None and generation.number > self._told_generation:
            self._told_generation = generation.number
            self._events.push(Sealed(generation))
        if closed is not None and not self._told_closed:
            self._told_closed = True
            self._events.push(closed)

    def _lead(self) -> None:
        """Lead if nobody does, go on leading if we do, stop if we do not any more."""
        with self.changed:
            lease, me, leadership, leader = self.lease, self.me, self.view.leader, self.leader
            taken_over = me.node in self.view.members and (
                self.view.members[me.node].incarnation > me.incarnation
            )
            closed = self.view.closed is not None
        if lease and taken_over:
            self._on_lost(lease, f"another agent took the node name {me.node!r}")
            return
        if not lease or closed:
            with self.changed:
                self.leader = None
            return
        if leadership is None and leader is None:
            leadership = self._campaign(lease, me)
        if leadership is None or (leadership.node, leadership.incarnation) != (me.node, me.incarnation):
            with self.changed:
                self.leader = None
            return
        if leader is None:
            self._begin_leading(leadership)
        else:
            leader.tick(self.view)

    def _campaign(self, lease: int, me: Member) -> Leadership | None:
        done = self._store.txn(
            (Compare(self._keys.leader, 0),),
            (Put(self._keys.leader, {"node": me.node, "incarnation": me.incarnation}, lease),),
        )
        if done.outcome is not Outcome.OK:
            return None
        return Leadership(me.node, me.incarnation, done.revision)

    def _begin_leading(self, leadership: Leadership) -> None:
        # Read again: what happened between the last event seen and our election counts.
        self._read_everything()
        leader = Leader(
            self._store,
            self._keys,
            leadership,
            policy=self._policy,
            # On a store that began anew (its host was restarted) numbers still only grow.
            first_generation=max(self._first_generation, self._told_generation + 1),
            clock=self._clock,
            committed_step=lambda: self.committed_step(),
        )
        with self.changed:
            if not self.lease:
                return
            self.leader = leader
        leader.take_over(self.view)
