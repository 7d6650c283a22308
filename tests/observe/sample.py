"""A recorded run in small: 4 workers, a worker dies at step 30, a node at 60 and comes back at 80, 120 steps.

Deterministic: times and losses are computed. `write(run_dir)` puts the two files there.
"""

from __future__ import annotations

import math
from pathlib import Path

from autoglm_elastic.observe import events as e
from autoglm_elastic.observe.metrics import Metric, MetricLog

START = 1_700_000_000.0
STEP_S = 0.1


def write(run_dir: Path, *, until_step: int = 120) -> None:
    log = e.EventLog(run_dir / e.EVENTS_NAME, source="node-a")
    metrics = MetricLog(run_dir / e.METRICS_NAME)
    now = START
    both, one = ["node-a", "node-b"], ["node-a"]

    def emit(event: e.Event, source: str = "node-a") -> None:
        log.emit(event, source=source, wall_time=now)

    def train(generation: int, first: int, last: int, world: int) -> None:
        nonlocal now
        for step in range(first, min(last, until_step) + 1):
            now += STEP_S
            loss = 1.9 + 3.6 * math.exp(-step / 25) + 0.05 * math.sin(step * 1.7)
            metrics.write(
                Metric(step=step, generation=generation, wall_time=now, loss=loss, world_size=world)
            )
            if step % 25 == 0:
                emit(
                    e.SnapshotCommitted(
                        step=step,
                        generation=generation,
                        entry=f"{step:010d}-g{generation}",
                        nbytes=8_100_000,
                        seconds=0.08,
                        stall_s=0.01,
                    )
                )

    def seal(number: int, parent: int, nodes: list[str], planned: bool, reason: str) -> None:
        emit(
            e.GenerationSealed(
                number=number,
                parent=parent,
                world_size=2 * len(nodes),
                nodes=nodes,
                planned=planned,
                reason=reason,
            )
        )

    def start_workers(node: str, generation: int, base: int, pids: dict[int, int]) -> None:
        for local, pid in pids.items():
            emit(
                e.WorkerStarted(
                    rank=base + local,
                    local_rank=local,
                    node=node,
                    pid=pid,
                    generation=generation,
                    how="fork",
                ),
                node,
            )

    def resumed(generation: int, parent: int, step: int, from_step: int, tier: str, reason: str) -> None:
        emit(
            e.IncidentClosed(
                generation=generation,
                parent=parent,
                step=step,
                from_step=from_step,
                tier=tier,
                reason=reason,
                committed_wall_time=now,
                phases_s={
                    "unwind": 0.021,
                    "seal": 0.012,
                    "group": 0.018,
                    "plan": 0.006,
                    "state": 0.034,
                    "first_step": 0.093,
                },
            ),
            "node-a/0",
        )

    for node, pid in (("node-a", 100), ("node-b", 200)):
        emit(e.JobStarted(run_id="demo", node=node, nproc=2, pid=pid, command=["gpt.py"]), node)
        emit(e.NodeJoined(node=node, nproc=2), node)
    now += 2.0
    seal(1, -1, both, False, "first round: all 2 nodes joined")
    start_workers("node-a", 1, 0, {0: 101, 1: 102})
    start_workers("node-b", 1, 2, {0: 201, 1: 202})
    now += 1.0
    train(1, 1, 1, 4)
    resumed(1, -1, 1, 0, "fresh", "nothing to resume from")
    train(1, 2, 30, 4)

    emit(e.FaultInjected(target="worker rank 1", pid=102, signal=9), "demo")
    now += 0.004
    emit(
        e.WorkerDied(
            rank=1,
            local_rank=1,
            node="node-a",
            pid=102,
            generation=1,
            exit_code=-9,
            step=30,
            message="rank 1 on node node-a died: signal 9 (SIGKILL)",
        )
    )
    emit(
        e.IncidentOpened(id=1, reason="rank 1 on node node-a died: signal 9 (SIGKILL)", node="node-a", rank=1)
    )
    now += 0.03
    seal(2, 1, both, False, "rank 1 on node node-a died: signal 9 (SIGKILL)")
    start_workers("node-a", 2, 0, {1: 103})
    now += 0.06
    train(2, 31, 31, 4)
    resumed(2, 1, 31, 30, "live", "live step 30 on rank 0")
    train(2, 32, 60, 4)

    emit(e.FaultInjected(target="node-b", pid=200, signal=9), "demo")
    now += 0.9
    emit(e.NodeLeft(node="node-b", reason="lease expired"))
    emit(e.IncidentOpened(id=2, reason="node-b left: lease expired", node="node-b"))
    now += 0.02
    seal(3, 2, one, False, "node-b left: lease expired")
    now += 0.06
    train(3, 60, 60, 2)
    resumed(3, 2, 60, 59, "live", "live step 59 on rank 0")
    train(3, 61, 80, 2)

    emit(e.NodeJoined(node="node-b", nproc=2, incarnation=1), "node-b")
    seal(4, 3, both, True, "node-b joined")
    start_workers("node-b", 4, 2, {0: 203, 1: 204})
    now += 0.3
    train(4, 81, 81, 4)
    resumed(4, 3, 81, 80, "live", "live step 80 on rank 0")
    train(4, 82, 120, 4)
    if until_step >= 120:
        now += 0.2
        emit(e.JobFinished(step=120, generation=4))
    log.close()
    metrics.close()
