"""A job on several hosts, by default with an etcd on hosts of its own, and what must hold on its logs afterwards."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agents import committed, in_lineage, wait_for
from certificates import files_in, flags_for, made
from etcd_cluster import Cluster
from job import SCRIPTS, Job
from net import Network
from table import note

TRAIN = (SCRIPTS / "train.py", "--steps=100000", "--pause-s=0.02")
MEMBERS = ("e1", "e2", "e3")
NODES = ("n1", "n2", "n3")
Training = Sequence[str | Path]
BACK_S_MAX = 60.0
"""How long anything here may take on a busy machine."""


class Scene:
    """`jobs`: the agents by host, one worker each. `store`: the flags that name it. `training`: the script and its
    arguments. `step`: the newest that any worker has reported."""

    def __init__(
        self, network: Network, store: tuple[str, ...], run_dir: Path, training: Training = TRAIN
    ) -> None:
        self.network, self.store, self.run_dir, self.training = network, store, run_dir, training
        self.step = 0
        self.workers: dict[str, int] = {}
        """The pid of each host's newest worker that has reported."""
        self.jobs: dict[str, Job] = {}
        self.gone: list[Job] = []
        self.fault_at = 0.0
        self._fault_generation = 0

    # The job

    def start(self, *hosts: str, flags: tuple[str, ...] = ()) -> None:
        for host in hosts:
            self.jobs[host] = Job(
                f"--nnodes=1:{len(NODES)}", "--nproc-per-node=1", "--rdzv-id=job", f"--rdzv-conf=node={host}",
                *self.store, *flags, "--run-dir", self.run_dir,
                *self.training,
                prefix=self.network[host].prefix,
            )  # fmt: skip

    def trains(self, world: int, more: int = 5, *, without: tuple[str, ...] = ()) -> int:
        """Wait until a world of that size has gone on by so many steps from now on; its newest step."""
        for job in self.jobs.values():
            job.read()
        self._take_in()
        target = self.step + more
        jobs = [job for host, job in self.jobs.items() if host not in without]
        wait_for(jobs, lambda line: line.get("world") == world and line.get("step", 0) >= target, BACK_S_MAX)
        self._take_in()
        return self.step

    def _take_in(self) -> None:
        """What has been reported, so that nobody looks through it again."""
        for host, job in self.jobs.items():
            for line in job.reports:
                self.step = max(self.step, line.get("step", 0))
                self.workers[host] = line["pid"]
            job.reports.clear()

    def first_node(self) -> str:
        """It hosts the generation's c10d store and rank 0."""
        return str(self.generations()[-1]["nodes"][0])

    def generations(self) -> list[dict[str, Any]]:
        return self.events("generation.sealed")

    def events(self, name: str, *, node: str = "") -> list[dict[str, Any]]:
        """The fields of the events of that name with their `wall_time`, in order."""
        found = []
        for record in map(json.loads, (self.run_dir / "events.jsonl").read_text().splitlines()):
            if record["name"] == name and (not node or record["fields"].get("node") == node):
                found.append({**record["fields"], "wall_time": record["wall_time"]})
        return found

    # Faults

    def fault(self) -> None:
        """The next thing that happens is one: recovery is counted from now."""
        self._fault_generation = self.generations()[-1]["number"]
        self.fault_at = time.time()

    def lose(self, host: str) -> None:
        """The host is gone at once, with everything on it."""
        self.fault()
        self.network.lose(host)
        self.gone.append(self.jobs.pop(host))
        self.gone[-1].wait(BACK_S_MAX)

    def recovery_s(self) -> float:
        """How long it took from the fault until a step of a newer generation was committed."""
        rows = map(json.loads, (self.run_dir / "metrics.jsonl").read_text().splitlines())
        at = next(row["wall_time"] for row in rows if row["generation"] > self._fault_generation)
        return float(at - self.fault_at)

    def recovered(self, scenario: str, outcome: str) -> None:
        """Notes how long that took."""
        note(scenario, outcome, self.recovery_s())

    # The end

    def end(self) -> None:
        """Stops the job with a snapshot and checks what must hold."""
        next(iter(self.jobs.values())).process.send_signal(signal.SIGTERM)
        for job in self.jobs.values():
            assert job.wait(BACK_S_MAX) == 75, job.output()
        self.check()

    def check(self) -> None:
        lines = committed(self.run_dir)
        assert in_lineage(self.run_dir) == lines, "a step of a fenced generation was written"
        for (one, before), (other, after) in itertools.pairwise(lines):
            assert after - before == 1, ((one, before), (other, after))
            assert other >= one, "an older generation went on"
        self.lost_nothing()
        newest = 0
        for closed in self.events("incident.closed")[1:]:
            assert closed["from_step"] >= newest, "a committed step was lost"
            newest = closed["step"]
        numbers = [sealed["number"] for sealed in self.generations()]
        assert len(set(numbers)) == len(numbers), "two hosts have put a generation to use as its first node"

    def lost_nothing(self) -> None:
        """Nothing had to be read back from disk."""
        closed = self.events("incident.closed")[1:]
        assert {incident["tier"] for incident in closed} <= {"live"}, closed[-1]

    def fenced_before_the_others_went_on(self, host: str) -> None:
        """Its workers were called off before a world without it was sealed."""
        stopped = [left for left in self.events("node.left", node=host) if left["wall_time"] > self.fault_at]
        assert stopped, f"{host} still runs while the others go on"
        left = stopped[-1]["wall_time"]
        without = next(
            sealed["wall_time"]
            for sealed in self.generations()
            if sealed["wall_time"] > self.fault_at and host not in sealed["nodes"]
        )
        assert left < without, f"{host} stopped {left - without:.2f} s after the others went on"

    def came_back(self, host: str) -> None:
        """Everybody trains together again, and it is there as a new member."""
        self.trains(len(self.jobs), more=20)
        joined = self.events("node.joined", node=host)
        assert joined, f"{host} did not rejoin"
        assert joined[-1]["wall_time"] > self.fault_at, f"{host} did not rejoin"
        assert set(self.generations()[-1]["nodes"]) == set(self.jobs)

    def output(self) -> str:
        return "\n".join(f"--- {host}\n{job.output()}" for host, job in self.jobs.items())

    def everyone(self) -> list[Job]:
        return [*self.jobs.values(), *self.gone]


@contextmanager
def scene(
    folder: Path, training: Training = TRAIN, *, flags: tuple[str, ...] = (), wired: Sequence[str] = ()
) -> Iterator[tuple[Scene, Cluster]]:
    """A host with an agent for each of `NODES`, all in one world, and the members of an etcd on `MEMBERS`. `flags`:
    more of every agent."""
    with Network(folder, *NODES, *MEMBERS, wired=wired) as network:
        places = [(network[name].address, network[name].prefix) for name in MEMBERS]
        plain = "--set=store.insecure=true"
        with (
            Cluster(folder / "etcd", members=len(MEMBERS), places=places) as etcd,
            _playing(
                Scene(network, ("--store", etcd.address, plain, *flags), folder / "run", training)
            ) as here,
        ):
            yield here, etcd


@contextmanager
def scene_with_hosted_store(folder: Path) -> Iterator[Scene]:
    """The same, with the store in the agent of the first of `NODES`, over TLS."""
    with Network(folder, *NODES) as network:
        host = network[NODES[0]].address
        made(folder / "tls", host)
        tls = flags_for(files_in(folder / "tls"))
        store = ("--rdzv-backend=autoglm", f"--rdzv-endpoint={host}:29400", *tls)
        with _playing(Scene(network, store, folder / "run")) as here:
            yield here


@contextmanager
def _playing(here: Scene) -> Iterator[Scene]:
    try:
        here.start(*NODES)
        here.trains(len(NODES))
        yield here
    except BaseException:
        print(here.output())
        raise
    finally:
        for name in NODES:
            here.network[name].kill()
        for job in here.everyone():
            job.__exit__()
