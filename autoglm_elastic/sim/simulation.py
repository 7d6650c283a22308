"""One simulation: a job on some nodes, faults, and a verdict. Equal seeds and configurations give equal
traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from autoglm_elastic.core.membership import Generation, Policy
from autoglm_elastic.sim.agent import Agent
from autoglm_elastic.sim.checker import Checker
from autoglm_elastic.sim.config import Fault, SimConfig, SimResult, Violation
from autoglm_elastic.sim.core import Core
from autoglm_elastic.sim.disk import SimDisk
from autoglm_elastic.sim.generate import random_config
from autoglm_elastic.sim.group import Group
from autoglm_elastic.sim.loop import Broke, Loop
from autoglm_elastic.sim.store import SimStore
from autoglm_elastic.sim.worker import Worker

SETTLE_S = 15.0
"""The world goes on for so long after the verdict, so that sleepers still wake up and do their worst."""


class Node:
    """A host: at most one agent at a time, each with a higher incarnation than the one before."""

    def __init__(self, sim: Simulation, name: str) -> None:
        self.sim, self.name = sim, name
        self.incarnation = 0
        self.agent: Agent | None = None

    def boot(self, held: Sequence[Worker | None] = ()) -> None:
        """`held`: workers that live on."""
        if self.sim.end:
            return
        self.incarnation += 1
        self.agent = Agent(self.sim, self, self.incarnation, held)
        self.sim.loop.soon(self.sim.config.message_s, self.agent, self.agent.start)

    def restart(self) -> None:
        if self.agent is None or not self.agent.alive:
            self.sim.loop.trace(f"node {self.name}: starts again")
            self.boot()


class Simulation:
    """Holds the parts together and lets the faults happen."""

    def __init__(self, seed: int, config: SimConfig, core: Core) -> None:
        self.seed, self.config, self.core = seed, config, core
        self.loop = Loop(seed, config)
        self.disk = SimDisk(self.loop)
        self.store = SimStore(self.loop)
        self.checker = Checker(self.loop, self.disk, config)
        self.policy = Policy(
            config.nodes_min,
            config.nodes_max,
            config.max_restarts,
            config.join_window_s,
            config.join_timeout_s,
            progress_s=30.0,
        )
        self.nodes = {name: Node(self, name) for name in _names(config.nodes)}
        self.end = self.end_reason = ""
        self.counts: Counter[str] = Counter()
        self._groups: dict[int, Group] = {}
        self._waiting = {fault: fault.nth for fault in config.faults if fault.when}
        self.loop.on_line = self._on_line if self._waiting else None

    def run(self) -> SimResult:
        for node in self.nodes.values():
            node.boot()
        for fault in self.config.faults:
            if not fault.when:
                self.loop.after(fault.at_s, None, self._strike, fault)
        violation: Violation | None = None
        try:
            self.loop.run(self.checker.after_event)
            if not self.end:
                self.loop.broke("I8", "nothing is left to happen and the job has not ended")
            if self.end == "done":
                self.checker.done()
        except Broke as broke:
            violation = broke.violation
        except Exception as error:  # noqa: BLE001  a machine that raises is a finding with a seed, not a crash
            violation = Violation("crash", f"{type(error).__name__}: {error}", self.loop.now)
            self.loop.trace(f"VIOLATION crash: {type(error).__name__}: {error}")
        return SimResult(
            seed=self.seed,
            config=self.config,
            end=self.end or "stuck",
            end_reason=self.end_reason,
            violation=violation,
            trace=tuple(self.loop.lines),
            trace_hash=self.loop.trace_hash(),
            events=self.loop.events,
            virtual_s=self.loop.now,
            counts=dict(self.counts),
        )

    def group(self, generation: Generation) -> Group:
        return self._groups.setdefault(generation.number, Group(self.loop, generation))

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def sealed(self, who: str, generation: Generation) -> None:
        places = " ".join(place.node for place in generation.placements)
        kind = "planned, " if generation.planned else ""
        self.loop.trace(f"{who}: seals generation {generation.number} [{places}] {kind}{generation.reason}")
        self.checker.sealed(generation)
        self.count("sealed")

    def verdict(self, end: str, reason: str, *, spent: bool) -> None:
        if not self.end:
            if end == "failed":
                live = sum(key.startswith("members/") for key in self.store.keys)
                self.checker.failed(reason, live, spent)
            self.end, self.end_reason = end, reason
            self.loop.trace(f"the job is {end}" + (f": {reason}" if reason else ""))
            self.loop.after(SETTLE_S, None, self._stop)

    def _stop(self) -> None:
        self.loop.ended = True

    def _on_line(self, line: str) -> None:
        for fault, left in self._waiting.items():
            if fault.when in line and left > 0:
                self._waiting[fault] = left - 1
                if left == 1:
                    self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        """A fault happens, if there is still something for it to hit."""
        name, _, local = fault.target.partition(".")
        agent = self._first_agent() if name == "rank0" else self.nodes[name].agent
        if agent is None or not agent.alive or self.end:
            return
        worker = agent.workers[int(local or 0)] if int(local or 0) < len(agent.workers) else None
        self.count(fault.kind)
        match fault.kind:
            case "kill-node":
                self._kill_node(agent, fault.duration_s)
            case "pause-node":
                self.loop.trace(f"fault: node {agent.node.name} is paused for {fault.duration_s:g} s")
                self._pause(agent, [agent, *(one for one in agent.workers if one)], fault.duration_s)
            case "pause-agent":
                self.loop.trace(
                    f"fault: agent of node {agent.node.name} is paused for {fault.duration_s:g} s"
                )
                self._pause(agent, [agent], fault.duration_s)
            case "cut-node":
                self._cut(agent, fault.duration_s)
            case _ if worker is None or not worker.alive:
                return
            case "kill-worker":
                self.loop.trace(f"fault: worker {worker.name} is killed")
                worker.die()
            case "pause-worker":
                self.loop.trace(f"fault: worker {worker.name} is paused for {fault.duration_s:g} s")
                worker.paused_until = self.loop.now + fault.duration_s
            case "crash-effect":
                worker.crash_in = fault.effects
            case _:
                raise ValueError(f"unknown fault {fault.kind!r}")

    def _first_agent(self) -> Agent | None:
        """The agent of the current generation's rank 0."""
        generation = self.store.get("generation")[0]
        return self.nodes[generation.placements[0].node].agent if generation is not None else None

    def _kill_node(self, agent: Agent, down_s: float) -> None:
        self.loop.trace(f"fault: node {agent.node.name} is down for {down_s:g} s")
        agent.alive = False
        self.checker.node_died(agent.node.name, agent.incarnation)
        for worker in agent.workers:
            if worker is not None:
                worker.die()
        self.loop.after(self.config.lease_s, None, self._expire, agent)
        self.loop.after(down_s, None, agent.node.restart)

    def _pause(self, agent: Agent, actors: Iterable[Agent | Worker], pause_s: float) -> None:
        for actor in actors:
            actor.paused_until = max(actor.paused_until, self.loop.now + pause_s)
        self.loop.after(self.config.lease_s, None, self._expire_if_paused, agent)

    def _expire_if_paused(self, agent: Agent) -> None:
        """It cannot renew its lease while it sleeps; it learns of that some time after it has woken up."""
        if agent.alive and agent.paused_until > self.loop.now and agent.lease_valid:
            self._expire(agent)
            self.loop.soon(self.config.message_s * 10, agent, agent.lease_lost)

    def _cut(self, agent: Agent, cut_s: float) -> None:
        self.loop.trace(f"fault: node {agent.node.name} is cut off for {cut_s:g} s")
        agent.cut_until = max(agent.cut_until, self.loop.now + cut_s)
        self.loop.after(self.config.fence_s, agent, self._fence, agent)

    def _fence(self, agent: Agent) -> None:
        """It could not renew its lease in time: it calls its workers off before anybody can count on
        their absence."""
        if agent.cut_until <= self.loop.now or not agent.lease_valid:
            return
        self.loop.trace(f"node {agent.node.name}: cut off, calls its workers off")
        agent.hold_workers()
        agent.lease_valid = False
        self.loop.after(self.config.lease_s - self.config.fence_s, None, self._expire, agent)
        self.loop.after(agent.cut_until - self.loop.now, agent, agent.lease_lost)

    def _expire(self, agent: Agent) -> None:
        self.store.expire(agent)


def run(seed: int, config: SimConfig | None = None, core: Core | None = None) -> SimResult:
    """Simulate one seed. Without a configuration the seed draws one, faults included."""
    return Simulation(seed, config or random_config(seed), core or Core()).run()


def search(seeds: Iterable[int], *, nodes: int = 3, core: Core | None = None) -> SimResult | None:
    """The first seed that breaks an invariant, or None."""
    for seed in seeds:
        result = run(seed, random_config(seed, nodes=nodes), core)
        if not result.ok:
            return result
    return None


def _names(count: int) -> list[str]:
    return [chr(ord("a") + index) if count <= 26 else f"n{index}" for index in range(count)]
