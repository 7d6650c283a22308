"""The leader's driver: feeds `core.membership` from the store and carries out what it decides.

It does what the machine's text asks of its caller: adopt what is sealed, then the members, then what was
reported; one transaction at a time; start over on a conflict; settle an unknown outcome by reading.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from autoglm_elastic.core import membership
from autoglm_elastic.core.membership import (
    Adopted,
    Broken,
    Effect,
    Entered,
    Event,
    FailJob,
    Finished,
    FinishJob,
    Generation,
    LeaderState,
    MemberDown,
    MemberUp,
    Seal,
    Tick,
    WakeAt,
)
from autoglm_elastic.core.outcome import Outcome
from autoglm_elastic.sim.store import Change

if TYPE_CHECKING:
    from autoglm_elastic.sim.agent import Agent


class Leadership:
    """One agent's time as the leader. `epoch` tells answers to an earlier beginning apart."""

    def __init__(self, agent: Agent) -> None:
        self._agent, self._sim = agent, agent.sim
        self._state: LeaderState | None = None
        self._epoch = 0
        self._read_revision = 0
        self._generation_revision = 0
        self._seals: deque[Generation] = deque()
        self._missed: list[Change] = []

    def begin(self) -> None:
        """Read everything and build the state from it."""
        self._epoch += 1
        self._state = None
        self._seals.clear()
        self._missed.clear()
        self._request(self._read_all, self._build)

    def _read_all(self) -> tuple[int, dict[str, tuple[Any, int]], int]:
        keys = {key: (value, revision) for key, (value, revision, _) in self._sim.store.keys.items()}
        return self._sim.store.revision, keys, max(self._sim.disk.records, default=-1)

    def _build(self, result: Any) -> None:
        if result is Outcome.UNKNOWN:
            self._sim.loop.soon(self._sim.config.retry_s, self._agent, self._again, self._epoch)
            return
        self._read_revision, keys, newest_record = result
        if keys.get("leader", (None, 0))[0] != self._agent.name_and_incarnation:
            self._agent.leadership = None
            return
        now = self._sim.loop.now
        self._state = membership.start(self._sim.policy, first_generation=max(newest_record, -1) + 1, now=now)
        generation, self._generation_revision = keys.get("generation", (None, 0))
        if generation is not None:
            self._feed(self._adopted(generation))
            for key, (value, _) in sorted(keys.items()):
                if key.startswith("entered/"):
                    self._news(key, value, members=False)
        for key, (value, _) in sorted(keys.items(), key=lambda item: item[1][1]):
            self._news(key, value, members=True)
        for key, (value, _) in sorted(keys.items(), key=lambda item: item[1][1]):
            self._news(key, value, members=False)
        missed, self._missed = self._missed, []
        for change in missed:
            self.on_change(change)

    def _again(self, epoch: int) -> None:
        if epoch == self._epoch:
            self.begin()

    def on_change(self, change: Change) -> None:
        if self._state is None:
            # It came between the reading and the answer: it may be newer than what was read.
            self._missed.append(change)
            return
        if change.revision <= self._read_revision:
            return
        if change.key == "leader" and change.value != self._agent.name_and_incarnation:
            self._epoch += 1
            self._agent.leadership = None
        elif change.key == "generation":
            self._generation_revision = max(self._generation_revision, change.revision)
            self._feed(self._adopted(change.value))
        else:
            self._news(change.key, change.value, members=True)
            self._news(change.key, change.value, members=False)

    def _news(self, key: str, value: Any, *, members: bool) -> None:
        kind, _, node = key.partition("/")
        now = self._sim.loop.now
        if kind == "members" and members:
            down = MemberDown(node, now, self._agent.step_seen)
            self._feed(down if value is None else MemberUp(value, now))
        elif kind == "entered" and not members:
            self._feed(Entered(node, value, now))
        elif kind == "reports" and not members and value is not None:
            if value[0] == "broken":
                self._feed(Broken(node, value[1], value[2], now, value[3]))
            else:
                self._feed(Finished(node, value[1], now))

    def _adopted(self, generation: Generation) -> Adopted:
        mine = generation.placement(self._agent.node.name)
        inside = mine is not None and mine.incarnation == self._agent.incarnation
        return Adopted(generation, self._sim.loop.now, inside)

    def _feed(self, event: Event) -> None:
        if self._state is None:
            return
        before = self._state
        self._state, effects = self._sim.core.lead(before, event)
        self._sim.checker.led(before, event, self._state, effects)
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Seal():
                self._seals.append(effect.generation)
                if len(self._seals) == 1:
                    self._seal()
            case WakeAt():
                wait_s = max(0.0, effect.time - self._sim.loop.now)
                self._sim.loop.after(wait_s, self._agent, self._wake, self._epoch)
            case FinishJob():
                self._end("done", "")
            case FailJob():
                self._end("failed", effect.reason)

    def _wake(self, epoch: int) -> None:
        if epoch == self._epoch:
            self._feed(Tick(self._sim.loop.now))

    def _seal(self) -> None:
        generation, expected = self._seals[0], self._generation_revision

        def put() -> tuple[Outcome, int]:
            store = self._sim.store
            led_elsewhere = store.get("leader")[0] != self._agent.name_and_incarnation
            if led_elsewhere or store.get("verdict")[0] is not None:
                return Outcome.CONFLICT, 0
            outcome = store.put("generation", generation, expected=expected)
            if outcome is Outcome.OK:
                self._sim.sealed(self._agent.name, generation)
            return outcome, store.revision

        self._request(put, self._after_seal)

    def _after_seal(self, result: Any) -> None:
        if result is Outcome.UNKNOWN:
            self._request(lambda: self._sim.store.get("generation"), self._after_reading)
        elif result[0] is Outcome.OK:
            self._sealed(result[1])
        else:
            self.begin()

    def _after_reading(self, result: Any) -> None:
        if result is Outcome.UNKNOWN:
            self._request(lambda: self._sim.store.get("generation"), self._after_reading)
        elif result[0] == self._seals[0]:
            self._sealed(result[1])
        elif result[1] == self._generation_revision:
            self._seal()
        else:
            self.begin()

    def _sealed(self, revision: int) -> None:
        self._generation_revision = revision
        self._seals.popleft()
        if self._seals:
            self._seal()

    def _end(self, end: str, reason: str) -> None:
        budget = None if self._state is None else self._state.budget
        spent = budget is not None and budget.failures > budget.allowed

        def put() -> Outcome:
            self._sim.verdict(end, reason, spent=spent)
            return self._sim.store.put("verdict", end)

        def then(result: Any) -> None:
            if result is Outcome.UNKNOWN:
                self._end(end, reason)

        self._request(put, then)

    def _request(self, apply: Any, then: Any) -> None:
        """An answer to what was asked before the last beginning is dropped."""
        epoch = self._epoch

        def current(result: Any) -> None:
            if epoch == self._epoch and self._agent.lease_valid:
                then(result)

        self._sim.store.request(self._agent, apply, current)
