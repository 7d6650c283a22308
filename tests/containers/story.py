"""What happens to the job, in order: each part is a fault and what must come of it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import NODES, Cluster, Status
from tools import Failed, say

ENDLESS = 10_000_000
MORE_STEPS = 20
STEPS_AFTER_THE_PAUSE = 200
SIZE = {"LAYERS": "1", "WIDTH": "64", "SEQ_LEN": "32"}
"""Of the model, for compose.yaml: small, so that a fault is a few steps away."""

RUN = "/runs/gpt"


@dataclass
class Row:
    """`seconds`: from the fault to the next committed step of those who go on; filled in afterwards."""

    scenario: str
    outcome: str
    at: float
    generation: int
    seconds: float | None = None


@dataclass
class Story:
    """`folder`: for what is taken out of the containers."""

    cluster: Cluster
    folder: Path
    rows: list[Row] = field(default_factory=list)
    steps: int = 0

    def play(self) -> None:
        """Until the job is done."""
        self.cluster.up(STEPS=str(ENDLESS), SNAPSHOT_INTERVAL_S="5", **SIZE)
        self._trains(3)
        say("three nodes train")
        self._a_node_is_killed()
        self._the_leader_of_etcd_is_killed()
        self._a_node_is_cut_off()
        self._the_job_is_stopped_and_started_again()

    def _a_node_is_killed(self) -> None:
        before = self._now()
        node = service(before["nodes"][-1])
        row = self._fault(before, f"docker kill {node}", "goes on with two; started again, it joins")
        self.cluster.kill(node)
        self._trains(2)
        self._told(row)
        self.cluster.start(node)
        self._trains(3)

    def _the_leader_of_etcd_is_killed(self) -> None:
        before = self._now()
        leader = self.cluster.etcd_leader()
        row = self._fault(before, f"docker kill {leader}, etcd's leader", "nobody is evicted")
        self.cluster.kill(leader)
        over = time.time() + 8.0  # more than twice a lease: whoever lost it would have been missed by now
        after = self.cluster.until("steps with two members of etcd", lambda told: time.time() > over)
        self._trains(3)
        if after["generation"] != before["generation"]:
            row.outcome = "a node lost its lease, and the job went on"
        self._told(row)
        self.cluster.start(leader)

    def _a_node_is_cut_off(self) -> None:
        before = self._now()
        node = service(before["nodes"][0])
        scenario = f"docker network disconnect {node}, the first node"
        row = self._fault(before, scenario, "fences itself, the others go on; connected again, it rejoins")
        self.cluster.disconnect(node)
        self._trains(2)
        self._told(row)
        self.cluster.connect(node)
        self._trains(3)

    def _the_job_is_stopped_and_started_again(self) -> None:
        before = self._now()
        row = self._fault(before, "docker compose stop n1 n2 n3, then up", "leaves with 75; resumes")
        self.cluster.close()
        self.cluster.compose("stop", *NODES)
        codes = self.cluster.exit_codes(*NODES)
        if codes != [75, 75, 75]:
            raise Failed(f"stopped nodes ended with {codes}, not with 75\n{self.cluster.logs()}")
        paused = self.folder / "paused"
        self.cluster.take("n1", RUN, paused)
        self.steps = len((paused / "metrics.jsonl").read_text().splitlines()) + STEPS_AFTER_THE_PAUSE
        self._told(row)
        row.at = time.time()
        self.cluster.up(STEPS=str(self.steps))
        codes = self.cluster.exit_codes(*NODES)
        if codes != [0, 0, 0]:
            raise Failed(f"the nodes ended with {codes}, not with 0\n{self.cluster.logs()}")
        say(f"done after step {self.steps}")

    def _fault(self, before: Status, scenario: str, outcome: str) -> Row:
        row = Row(scenario, outcome, time.time(), int(before["generation"]))
        self.rows.append(row)
        say(scenario)
        return row

    def _told(self, row: Row) -> None:
        say(f"  {row.outcome}")

    def _now(self) -> Status:
        return self.cluster.until("steps", lambda told: told["state"] == "running" and told["step"] > 0)

    def _trains(self, world: int) -> Status:
        """A world of that size has gone on by `MORE_STEPS`."""
        first: list[int] = []

        def goes_on(told: Status) -> bool:
            if told["world_size"] != world or told["state"] != "running" or told["step"] < 1:
                first.clear()
                return False
            first.append(told["step"])
            return bool(told["step"] >= first[0] + MORE_STEPS)

        return self.cluster.until(f"{world} nodes train", goes_on)


def service(node: dict[str, Any]) -> str:
    """Whose container a node of a status is."""
    name = str(node["node"]).partition("-")[0]
    if name not in NODES:
        raise Failed(f"node {node['name']} is none of {NODES}")
    return name


def measure(rows: list[Row], run_dir: Path) -> None:
    """Fills in how long each fault kept the job from committing a step."""
    committed = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        later = [line for line in committed if line["wall_time"] > row.at]
        newer = [line for line in later if line["generation"] > row.generation]
        others = [other.at for other in rows if other.at > row.at]
        until = min(others, default=float("inf"))
        if newer and newer[0]["wall_time"] < until:
            row.seconds = newer[0]["wall_time"] - row.at
        elif later:
            row.seconds = later[0]["wall_time"] - row.at


def table(rows: list[Row]) -> str:
    lines = ["| what was done | what came of it | to the next committed step |", "| --- | --- | --- |"]
    lines += [
        f"| {row.scenario} | {row.outcome} | {'' if row.seconds is None else f'{row.seconds:.2f} s'} |"
        for row in rows
    ]
    return "\n".join(lines)
