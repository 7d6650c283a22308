"""Virtual time, the one source of randomness, and the trace. Nothing here knows what is being simulated.

An event belongs to an actor: a dead one's events are dropped, a paused one's wait until it wakes up, and then
come in a shuffled order, because that is what a process finds that slept while the world went on.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from typing import Any

from autoglm_elastic.sim.config import SimConfig, Violation


class Broke(Exception):
    """An invariant does not hold."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(str(violation))
        self.violation = violation


class Actor:
    """Something that can die or be paused."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused_until = 0.0


class Loop:
    """The event queue of one simulation."""

    def __init__(self, seed: int, config: SimConfig) -> None:
        self.config = config
        self.random = random.Random(seed)  # noqa: S311  a simulation must be repeatable, not secret
        self.now = 0.0
        self.events = 0
        self.ended = False
        self.lines: list[str] = []
        self.on_line: Callable[[str], None] | None = None
        self._queue: list[tuple[float, int, Actor | None, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0

    def after(self, delay_s: float, actor: Actor | None, call: Callable[..., None], *args: Any) -> None:
        """Run `call` after exactly `delay_s`; `actor` None for what happens to nobody in particular."""
        self._sequence += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._sequence, actor, call, args))
        if len(self._queue) > self.config.queue_max:
            self.broke("I9", f"{len(self._queue)} events are under way")

    def soon(self, mean_s: float, actor: Actor | None, call: Callable[..., None], *args: Any) -> None:
        """Run `call` after a random delay around `mean_s`, sometimes a long one: so messages overtake each
        other."""
        self.after(self.delay(mean_s), actor, call, *args)

    def delay(self, mean_s: float) -> float:
        if self.config.steady:
            return mean_s
        draw = self.random.random()
        return mean_s * (0.5 + draw) * (20.0 if self.random.random() < self.config.slow else 1.0)

    def chance(self, probability: float) -> bool:
        return not self.config.steady and probability > 0 and self.random.random() < probability

    def trace(self, line: str) -> None:
        self.lines.append(f"{self.now:8.3f} {line}")
        if self.on_line is not None:
            self.on_line(line)

    def trace_hash(self) -> str:
        return hashlib.blake2b("\n".join(self.lines).encode(), digest_size=8).hexdigest()

    def broke(self, name: str, what: str) -> None:
        """Raises Broke: the simulation ends here."""
        self.trace(f"VIOLATION {name}: {what}")
        raise Broke(Violation(name, what, self.now))

    def run(self, after_event: Callable[[], None]) -> None:
        """Until nothing is left to happen, or `ended` is set, or a bound is passed (raises Broke)."""
        config = self.config
        while self._queue and not self.ended:
            at, _, actor, call, args = heapq.heappop(self._queue)
            if actor is not None and not actor.alive:
                continue
            self.now = max(self.now, at)
            if actor is not None and actor.paused_until > self.now:
                self.after(actor.paused_until - self.now + self.delay(config.message_s), actor, call, *args)
                continue
            self.events += 1
            if self.now > config.horizon_s:
                self.broke("I8", f"the job has not ended after {config.horizon_s:g} virtual seconds")
            if self.events > config.events_max:
                self.broke("I9", f"more than {config.events_max} events")
            call(*args)
            after_event()
