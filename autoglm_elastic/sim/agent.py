"""A simulated agent: one node's membership, its workers, and now and then the leadership.

It follows the store by watch, reports what happened to its workers, and carries out `World`s. An agent whose
lease is lost calls its workers out of every generation and comes back with a higher incarnation; one that cannot
renew it calls them out before it can be lost. They keep their state meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from autoglm_elastic.core.membership import Failure, Generation, Member
from autoglm_elastic.core.outcome import Outcome
from autoglm_elastic.sim.leading import Leadership
from autoglm_elastic.sim.store import Change, Client
from autoglm_elastic.sim.worker import Worker

if TYPE_CHECKING:
    from autoglm_elastic.sim.simulation import Node, Simulation

_FOLLOWED: Final = frozenset({"generation", "leader", "verdict"})
"""What an agent that does not lead acts on; the leader reads and hears everything."""


class Agent(Client):
    """One incarnation of a node's agent. `held`: workers of the one before."""

    def __init__(
        self, sim: Simulation, node: Node, incarnation: int, held: Sequence[Worker | None] = ()
    ) -> None:
        super().__init__(f"node {node.name}")
        self.sim, self.node, self.incarnation = sim, node, incarnation
        self.view: dict[str, tuple[Any, int]] = {}
        self.workers: list[Worker | None] = list(held) or [None] * sim.config.workers
        self.holds = bool(held)
        for worker in held:
            if worker is not None:
                worker.agent = self
        self.generation: Generation | None = None
        self.entered_at = 0.0
        self.step_seen = -1
        self.leadership: Leadership | None = None
        self._joined = self._leading = False
        self._reported = -1

    def start(self) -> None:
        """Put the member key under the lease, watch, and read everything."""
        self.sim.store.request(self, self._join, self._after_join)

    def _join(self) -> dict[str, tuple[Any, int]] | Outcome:
        if not self.alive or not self.lease_valid:
            return Outcome.CONFLICT
        store = self.sim.store
        if not self._joined:
            self._joined = True
            member = Member(
                self.node.name, self.node.name, self.sim.config.workers, "default", self.incarnation
            )
            store.put(f"members/{self.node.name}", member, owner=self)
            store.watch(self)
        return {key: store.get(key) for key in _FOLLOWED if key in store.keys}

    def _after_join(self, result: dict[str, tuple[Any, int]] | Outcome) -> None:
        if isinstance(result, Outcome):
            if self.lease_valid:
                self.sim.loop.soon(self.sim.config.retry_s, self, self.start)
            return
        for key, (value, revision) in result.items():
            self.on_change(Change(key, value, revision))
        if self.view.get("leader", (None, 0))[0] is None:
            self._run_for_leader()

    def heeds(self, key: str) -> bool:
        return self.leadership is not None or key in _FOLLOWED

    def on_change(self, change: Change) -> None:
        """News from the store; old ones are skipped."""
        if change.key in _FOLLOWED:
            if change.revision <= self.view.get(change.key, (None, 0))[1]:
                return
            self.view[change.key] = (change.value, change.revision)
            self._follow(change)
        if self.leadership is not None:
            self.leadership.on_change(change)

    def _follow(self, change: Change) -> None:
        if change.key == "generation":
            self._enter(change.value)
        elif change.key == "leader" and change.value is None:
            self._run_for_leader()
        elif change.key == "leader" and change.value == self.name_and_incarnation:
            # An election whose outcome was unknown, or that was applied late.
            self._lead()
        elif change.key == "verdict":
            self.stop_workers()

    def _run_for_leader(self) -> None:
        if self._leading or self.leadership is not None:
            return
        self._leading = True

        def take() -> Outcome:
            return self.sim.store.put("leader", self.name_and_incarnation, owner=self, expected=0)

        self.sim.store.request(self, take, self._after_election)

    def _after_election(self, outcome: Outcome) -> None:
        self._leading = False
        if outcome is Outcome.UNKNOWN:
            self.sim.store.request(self, lambda: self.sim.store.get("leader")[0], self._after_reading_leader)
        elif outcome is Outcome.OK:
            self._lead()

    def _after_reading_leader(self, leader: object) -> None:
        if leader == self.name_and_incarnation:
            self._lead()
        elif leader is None or leader is Outcome.UNKNOWN:
            self.sim.loop.soon(self.sim.config.retry_s, self, self._run_for_leader)

    def _lead(self) -> None:
        if self.leadership is None and self.lease_valid:
            self.sim.loop.trace(f"{self.name}: leads")
            self.leadership = Leadership(self)
            self.leadership.begin()

    @property
    def name_and_incarnation(self) -> str:
        return f"{self.node.name}#{self.incarnation}"

    def _enter(self, generation: Generation | None) -> None:
        """A generation was sealed: tell the workers, replace the dead ones; stop them all if this node is not
        in it."""
        if generation is None or (self.generation and generation.number <= self.generation.number):
            return
        self.generation, self.entered_at = generation, self.sim.loop.now
        place = generation.placement(self.node.name)
        if place is None or place.incarnation != self.incarnation:
            if not self.holds:
                self.stop_workers()
            return
        self.holds = False
        self._report_entered(generation)
        for local, worker in enumerate(self.workers):
            if worker is not None and worker.alive and not worker.done:
                self.sim.loop.soon(self.sim.config.message_s, worker, worker.on_world, generation)
            elif worker is None or not worker.done or not self._grew_from(worker.world):
                self._fork(local, generation)

    def _report_entered(self, generation: Generation) -> None:
        """Put until confirmed, or until it is stale."""

        def put() -> Outcome:
            return self.sim.store.put(f"entered/{self.node.name}", generation.number)

        def then(outcome: Outcome) -> None:
            if outcome is Outcome.UNKNOWN and self.generation is generation:
                self.sim.loop.soon(self.sim.config.retry_s, self, self._report_entered, generation)

        self.sim.store.request(self, put, then)

    def _fork(self, local: int, generation: Generation) -> None:
        fresh = Worker(self.sim, self, local)
        self.workers[local] = fresh
        self.sim.loop.soon(self.sim.config.fork_s, fresh, fresh.on_world, generation)

    def _grew_from(self, world: Generation | None) -> bool:
        """Whether `world` is the newest generation, or one that it only grew from."""
        return bool(self.generation and world and self.generation.nodes_of(world.number) is not None)

    def committed(self, step: int) -> None:
        self.step_seen = max(self.step_seen, step)

    def worker_died(self, worker: Worker) -> None:
        self.sim.loop.soon(self.sim.config.message_s, self, self._report_death, worker, self.sim.loop.now)

    def _report_death(self, worker: Worker, died_at: float) -> None:
        generation = self.generation
        if generation is None or self.workers[worker.local] is not worker:
            return
        place = generation.placement(self.node.name)
        if place is None or self._reported >= generation.number:
            return
        self._reported = generation.number
        failure = Failure(
            self.node.name, worker.local, place.base_rank + worker.local, -9, "", self.step_seen, 0.0
        )
        alive_s = max(0.0, died_at - self.entered_at)
        self._report(("broken", generation.number, failure, alive_s))

    def worker_done(self, worker: Worker) -> None:
        self.sim.loop.soon(self.sim.config.message_s, self, self._report_done, worker)

    def _report_done(self, worker: Worker) -> None:
        """All done: finished. Done in a generation that the newest does not build on: too late, go on in that
        one."""
        world = worker.world
        if self.generation is None or world is None or self.workers[worker.local] is not worker:
            return
        if not self._grew_from(world):
            self._fork(worker.local, self.generation)
        elif all(one is not None and one.done and one.world is world for one in self.workers):
            self._report(("finished", world.number))

    def _report(self, report: tuple[Any, ...]) -> None:
        """Put until confirmed, or until it is stale."""

        def put() -> Outcome:
            return self.sim.store.put(f"reports/{self.node.name}", report)

        def then(outcome: Outcome) -> None:
            if outcome is Outcome.UNKNOWN and self.generation and self.generation.nodes_of(report[1]):
                self.sim.loop.soon(self.sim.config.retry_s, self, self._report, report)

        self.sim.store.request(self, put, then)

    def stop_workers(self) -> None:
        """Kill them; nobody reports what was meant."""
        workers, self.workers = self.workers, [None] * len(self.workers)
        for worker in workers:
            if worker is not None:
                worker.die()

    def hold_workers(self) -> None:
        """They leave every generation that this agent has told them of, and keep their state. When one is done with its
        training, all are stopped: its state is gone."""
        if self.generation is None or any(worker is not None and worker.done for worker in self.workers):
            self.stop_workers()
            return
        self.holds = True
        for worker in self.workers:
            if worker is not None:
                worker.hold(self.generation.number)

    def lease_lost(self) -> None:
        """Begin anew, as a new incarnation."""
        self.sim.loop.trace(f"{self.name}: lost its lease")
        self.hold_workers()
        self.alive = False
        self.node.boot(self.workers if self.holds else ())
