"""The leader's hands: feeds `core.membership` what the store shows and carries out its effects in the store.

Everything is written in transactions that compare the leader's own key, so that an agent that is no longer
the leader, however late it wakes up, changes nothing. It has no thread; the session calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from autoglm_elastic.agent._keys import Keys
from autoglm_elastic.agent._view import Closed, Leadership, View
from autoglm_elastic.core import membership as core
from autoglm_elastic.ports import Clock, Compare, Delete, Outcome, Put, Store

log = logging.getLogger(__name__)

GENERATIONS_KEPT: Final = 64
"""Newest records under `generations/` in the store; the run directory has them all."""

DELETES_MAX: Final = 100
"""Stale keys that one seal clears away; the rest waits for the next. etcd takes 128 operations in a transaction
unless it is told otherwise."""


class Deposed(Exception):
    """Somebody else leads, or sealed meanwhile: this leader's state is worth nothing."""


class Leader:
    """Takes over the run as `view` shows it. `deadline`: call `tick` then (monotonic seconds), None: no need.

    Raises (every method): Deposed, StoreUnavailable, StoreRefused. After any of them throw it away and, if
    the leader's key is still ours, begin with a new one from a fresh view: what became of the last effect is
    read, never assumed.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        leadership: Leadership,
        *,
        policy: core.Policy,
        first_generation: int,
        clock: Clock,
        committed_step: Callable[[], int],
    ) -> None:
        self._store = store
        self._keys = keys
        self._leadership = leadership
        self._clock = clock
        self._committed_step = committed_step
        self._state = core.start(policy, first_generation=first_generation, now=clock.monotonic())
        self._generation_revision = 0
        self._ended = False
        self.deadline: float | None = None

    @property
    def leadership(self) -> Leadership:
        return self._leadership

    def take_over(self, view: View) -> None:
        now = self._clock.monotonic()
        self._generation_revision = view.generation_revision
        current = view.generation
        if current is not None:
            mine = current.placement(self._leadership.node)
            inside = mine is not None and mine.incarnation == self._leadership.incarnation
            self.feed(view, core.Adopted(current, now, inside))
            for number, node in sorted(view.entered):
                self.feed(view, core.Entered(node, number, now))
            for number, node in sorted(view.finished):
                self.feed(view, core.Finished(node, number, now))
        for member in list(view.members.values()):
            # Whoever finished in an earlier generation waits for the end; he is no newcomer.
            placed = current is not None and current.placement(member.node) is not None
            if placed or not view.has_finished(member.node):
                self.feed(view, core.MemberUp(member, now))
        if current is None:
            return
        for placement in current.placements:
            if placement.node not in view.members:
                self.feed(view, core.MemberDown(placement.node, now, incarnation=placement.incarnation))
        for (number, node), report in sorted(view.broken.items(), key=lambda item: item[0]):
            self.feed(view, core.Broken(node, number, report.failure, now, report.alive_s))

    def tick(self, view: View) -> None:
        if self.deadline is not None and self._clock.monotonic() >= self.deadline:
            self.deadline = None
            self.feed(view, core.Tick(self._clock.monotonic()))

    def feed(self, view: View, event: core.Event) -> None:
        if self._ended:
            return
        if isinstance(event, core.MemberDown):
            # A node that is gone cannot tell how far it was; ours was as far, within a step.
            event = replace(event, step=max(event.step, self._committed_step()))
        self._state, effects = core.step(self._state, event)
        for effect in effects:
            match effect:
                case core.Seal(generation):
                    self._seal(view, generation)
                case core.FailJob(reason, first_failure):
                    self._close(Closed("failed", reason, first_failure))
                case core.FinishJob():
                    self._close(Closed("done", "every node finished", None))
                case core.WakeAt(time):
                    self.deadline = time

    def _seal(self, view: View, generation: core.Generation) -> None:
        data = generation.to_json()
        record = {
            "generation": data,
            "leader": self._leadership.node,
            "wall_time": self._clock.wall(),
        }
        done = self._store.txn(
            (
                Compare(self._keys.leader, self._leadership.revision),
                Compare(self._keys.generation, self._generation_revision),
                Compare(self._keys.closed, 0),
            ),
            (
                Put(self._keys.generation, data),
                Put(self._keys.history(generation.number), record),
                *self._stale(view, generation),
            ),
        )
        if done.outcome is not Outcome.OK:
            raise Deposed
        self._generation_revision = done.revision
        log.info("sealed generation %d: %s", generation.number, generation.reason)

    def _stale(self, view: View, generation: core.Generation) -> list[Delete]:
        """What earlier generations left behind and nobody can ask for any more."""
        number = generation.number
        stale = [self._keys.broken(old, node) for old, node in view.broken if old < number]
        stale += [self._keys.entered(old, node) for old, node in view.entered if old < number]
        stale += [self._keys.c10d(old) for old in view.c10d if old < generation.parent]
        stale += [self._keys.history(old) for old in view.history if old <= number - GENERATIONS_KEPT]
        return [Delete(key) for key in stale[:DELETES_MAX]]

    def _close(self, closed: Closed) -> None:
        self._ended = True
        self.deadline = None
        done = self._store.txn(
            (Compare(self._keys.leader, self._leadership.revision), Compare(self._keys.closed, 0)),
            (Put(self._keys.closed, closed.to_json()),),
        )
        if done.outcome is not Outcome.OK:
            raise Deposed
