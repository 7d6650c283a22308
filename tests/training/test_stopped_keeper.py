"""The keeper of a node is stopped, as by a debugger, a cgroup's freezer or a disk that hangs: snapshots fail or wait,
training goes on."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from harness import Cluster, Zygote

from autoglm_elastic.keeper import AGENT, Keeper

WAIT_S = 60.0
EVERY_2 = {"snapshot": {"interval_steps": 2, "interval_s": 0}}


@pytest.mark.parametrize(
    ("stopped_at", "until_the_end"),
    [(1, False), (1, True), (5, False)],
    ids=["before the first snapshot", "from the first snapshot to the last step", "after a snapshot"],
)
def test_training_takes_all_its_steps(
    zygote: Zygote, tmp_path: Path, run_dir: Path, stopped_at: int, until_the_end: bool
) -> None:
    args = {"steps": 16, "holds": [[0, stopped_at, -1], [0, 15, -1]], "memory_s": 2.0}
    with (
        contextlib.closing(Keeper.ensure(str(run_dir), rank=AGENT)) as keeper,
        Cluster(zygote, tmp_path, "train", args, run_dir=run_dir, settings=EVERY_2) as cluster,
    ):
        cluster.start(2)
        first = cluster.alive[0]
        cluster.wait_said(first, waiting=stopped_at)
        if stopped_at > 2:
            cluster.wait(lambda: bool(cluster.events("snapshot.committed")), "a snapshot")
        os.kill(keeper.pid, signal.SIGSTOP)
        try:
            cluster.say_go()
            cluster.wait_said(first, waiting=15)
            committed = [e["step"] for e in cluster.events("snapshot.committed")]
            assert max(committed, default=0) <= stopped_at
            if until_the_end:
                cluster.say_go()
                cluster.wait(lambda: max(aborted(cluster)) >= 14, "refusal of one of the last snapshots")
        finally:
            os.kill(keeper.pid, signal.SIGCONT)
        if not until_the_end:
            assert keeper.settle(WAIT_S)
            cluster.say_go()
        cluster.wait_exits()
        committed = [e["step"] for e in cluster.events("snapshot.committed")]
        assert committed[-1:] == [16], "\n".join(f"{k} {v}" for k, v in aborted(cluster).items())
        assert len({r["digest"] for r in cluster.results()}) == 1


def aborted(cluster: Cluster) -> dict[int, str]:
    """Why, by step."""
    return {event["step"]: event["reason"] for event in cluster.events("snapshot.aborted")}
