"""DataLoader's worker processes, and a world on ::1, across a recovery."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest
from harness import Cluster, Zygote
from test_recovery import committed_indices


def test_loader_processes_end_with_their_world_and_keep_the_order(zygote: Zygote, tmp_path: Path) -> None:
    args = {"steps": 12, "batch": 6, "size": 27, "die": {"rank": 1, "step": 6}, "loaders": 2}
    with Cluster(zygote, tmp_path, "train", args) as cluster:
        cluster.start(2)
        survivor, doomed = cluster.alive
        cluster.wait_said(doomed, dying=6)
        loaders = psutil.Process(survivor.pid).children()
        assert len(loaders) == 2
        cluster.kill(doomed)
        cluster.reform(add=1)
        cluster.wait_said(survivor, committed=8)
        gone, _ = psutil.wait_procs(loaders, timeout=30)
        assert len(gone) == 2, "those of the world before have ended"
        cluster.wait_exits()
        assert len({r["digest"] for r in cluster.results()}) == 1
        indices = committed_indices(cluster)
    for epoch in range(2):
        taken = [i for step in range(epoch * 5, epoch * 5 + 5) for i in indices[step + 1]]
        assert sorted(taken) == list(range(27))


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return os.path.exists("/proc/net/if_inet6")


@pytest.mark.skipif(not has_ipv6(), reason="no ::1 here")
def test_a_world_on_ipv6(zygote: Zygote, tmp_path: Path) -> None:
    args = {"steps": 9, "holds": [[0, 4, 2]]}
    with Cluster(zygote, tmp_path, "train", args, host="::1") as cluster:
        cluster.start(3)
        hanging = cluster.alive[2]
        cluster.wait_said(hanging, holding=4)
        cluster.forget(hanging)
        cluster.reform(add=1)
        cluster.wait_exits()
        assert len({r["digest"] for r in cluster.results()}) == 1
        assert {(r.tier, r.from_step) for r in cluster.resumed(1)} == {("live", 4)}
