"""Random faults on the hosts of a scene: one after the other, or a node's and an etcd member's at once.

Each is waited out, mended, and remembered. One node and two members of etcd always stay, and reach each other.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from etcd_cluster import Cluster
from scene import BACK_S_MAX, MEMBERS, NODES, Scene

from autoglm_elastic.observe.events import EVENTS_NAME, EventLog, FaultInjected

OF_NODES: Final = {
    "a worker killed": 6,
    "two workers killed": 2,
    "an agent killed": 4,
    "a host lost": 4,
    "two hosts lost": 1,
    "a node cut off": 3,
    "a node cut off one way": 3,
}
"""With its weight; each of these breaks the world."""
OF_MEMBERS: Final = {"killed": 3, "stopped": 3, "lost with its host": 1, "cut off": 2, "cut off one way": 2}
"""With its weight; none of these should break the world."""
AT_ONCE: Final = {"node": 5, "member": 3, "both": 2}
STEPS: Final = (5, 60)
"""How many, at least and at most, between what is done: the longest are a few seconds."""


@dataclass
class Fault:
    """`at`, `over`: seconds since the epoch; over: all is mended, and everybody trains. `breaks`: the world."""

    kind: str
    breaks: bool
    at: float
    step: int
    over: float = 0.0


class Faults:
    """What is drawn depends on the seed alone; how many faults there are, on time."""

    def __init__(self, here: Scene, etcd: Cluster, seed: int) -> None:
        self.here, self.etcd = here, etcd
        self.done: list[Fault] = []
        self._dice = random.Random(seed)
        self._log = EventLog(here.run_dir / EVENTS_NAME, source="test")

    def next(self) -> None:
        self.here.trains(len(NODES), more=self._steps())
        which = self._draw(AT_ONCE)
        kind, fate = self._draw(OF_NODES), self._draw(OF_MEMBERS)
        match which:
            case "node":
                self._begin(kind)
                self._on_nodes(kind)
            case "member":
                self._begin(f"an etcd member {fate}", breaks=False)
                with self._member(fate):
                    self.here.trains(len(NODES), more=self._steps())
            case "both":
                self._begin(f"{kind}, with an etcd member away")
                with self._member(fate):
                    self._on_nodes(kind)
                    self.here.trains(len(NODES), more=STEPS[0])
        self.here.trains(len(NODES), more=STEPS[0])
        self.done[-1].over = time.time()
        self.here.lost_nothing()

    def _begin(self, kind: str, *, breaks: bool = True) -> None:
        self.here.fault()
        self.done.append(Fault(kind, breaks, self.here.fault_at, self.here.step))
        print(f"{self.here.fault_at:.3f} step {self.here.step}: {kind}", flush=True)
        if breaks:
            self._log.emit(FaultInjected(target=kind), wall_time=self.here.fault_at)
            self._log.close()

    def _on_nodes(self, kind: str) -> None:
        one, other = self._dice.sample(NODES, 2)
        match kind:
            case "a worker killed":
                os.kill(self.here.workers[one], signal.SIGKILL)
            case "two workers killed":
                for host in (one, other):
                    os.kill(self.here.workers[host], signal.SIGKILL)
            case "an agent killed":
                self._kill_agent(one)
            case "a host lost":
                self._lose(one)
            case "two hosts lost":
                self._lose(one, other)
            case _:
                self._cut_off(one, one_way=kind.endswith("one way"))

    def _kill_agent(self, host: str) -> None:
        """It comes back at once, or when the others have gone on without it."""
        job = self.here.jobs.pop(host)
        self.here.gone.append(job)
        job.process.kill()
        job.wait(BACK_S_MAX)
        if self._dice.random() < 0.5:
            self.here.trains(len(self.here.jobs), more=self._steps())
        self.here.start(host)

    def _lose(self, *hosts: str) -> None:
        for host in hosts:
            self.here.lose(host)
        self.here.trains(len(self.here.jobs), more=self._steps())
        for host in hosts:
            self.here.network.plug(host)
        self.here.start(*hosts)

    def _cut_off(self, host: str, *, one_way: bool) -> None:
        self._cut(host, one_way=one_way)
        self.here.trains(len(NODES) - 1, more=self._steps(), without=(host,))
        self.here.fenced_before_the_others_went_on(host)
        self.here.network.heal()
        self.here.came_back(host)

    def _cut(self, host: str, *, one_way: bool) -> None:
        network = self.here.network
        others = [name for name in network.hosts if name != host]
        if not one_way:
            network.isolate(host)
        elif self._dice.random() < 0.5:
            network.cut_one_way([host], others)
        else:
            network.cut_one_way(others, [host])

    @contextlib.contextmanager
    def _member(self, fate: str) -> Iterator[None]:
        """One is away meanwhile, every other time the leader."""
        network, etcd = self.here.network, self.etcd
        leader = network[MEMBERS[0]].ask(etcd.leader)
        followers = [number for number in range(len(MEMBERS)) if number != leader]
        member = self._dice.choice([leader, leader, *followers])
        host = MEMBERS[member]
        print(f"  {host}{', the leader,' if member == leader else ''} {fate}", flush=True)
        match fate:
            case "killed":
                etcd.kill(member)
            case "stopped":
                etcd.stop(member)
            case "lost with its host":
                network.unplug(host)
                etcd.kill(member)
            case _:
                self._cut(host, one_way=fate.endswith("one way"))
        yield
        match fate:
            case "killed":
                etcd.start(member)
            case "stopped":
                etcd.cont(member)
            case "lost with its host":
                network.plug(host)
                etcd.start(member)
            case _:
                network.heal()
        self._serves(member)

    def _serves(self, member: int) -> None:
        """Wait until it answers a linearizable read: it is in touch with a leader, and has caught up."""
        deadline = time.monotonic() + BACK_S_MAX
        while True:
            with contextlib.suppress(OSError):
                self.here.network[MEMBERS[member]].ask(
                    lambda: self.etcd.ask(member, "kv/range", {"key": "AA=="})
                )
                return
            assert time.monotonic() < deadline, f"etcd's member {member} does not come back"
            self.here.trains(len(NODES), more=1)

    def _draw(self, weighted: dict[str, int]) -> str:
        return self._dice.choices(list(weighted), weights=list(weighted.values()))[0]

    def _steps(self) -> int:
        return self._dice.randint(*STEPS)


def table(faults: Sequence[Fault]) -> dict[str, list[Fault]]:
    """By kind, the most frequent first."""
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(fault)
    return dict(sorted(kinds.items(), key=lambda pair: -len(pair[1])))
