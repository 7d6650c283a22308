"""An object store that takes connections and never answers, while a worker dies. A real S3 server, stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Cluster, Zygote
from object_store import CREDENTIALS, Bucket, moto_server

pytest.importorskip("boto3")


def test_a_recovery_from_live_state_waits_for_no_store(
    zygote: Zygote, make_bucket: Callable[[str], Bucket], tmp_path: Path, run_dir: Path
) -> None:
    """Each request would be given minutes; the whole recovery is over before the store says anything. When it does,
    the record that was owed is written, and snapshots go on."""
    with moto_server() as (endpoint, server):
        bucket = make_bucket(endpoint)
        settings = {"snapshot": {"url": bucket.url, "interval_steps": 4, "interval_s": 0}}
        args = {"steps": 12, "holds": [[0, 6, 1], [1, 7, -1]]}
        with Cluster(
            zygote,
            tmp_path,
            "train",
            args,
            run_dir=run_dir,
            settings=settings,
            environ={**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint},
        ) as cluster:
            cluster.start(2)
            survivor, doomed = cluster.alive
            cluster.wait_said(doomed, holding=6)
            cluster.wait(lambda: bool(cluster.events("snapshot.committed")), "snapshot of step 4")
            os.kill(server.pid, signal.SIGSTOP)
            cluster.kill(doomed)
            cluster.reform(add=1)
            cluster.wait_said(survivor, waiting=7)
            assert {(r.tier, r.from_step) for r in cluster.resumed(1)} == {("live", 6)}
            assert [e["reason"] for e in cluster.events("generation.unrecorded")] == ["no answer within 1 s"]
            os.kill(server.pid, signal.SIGCONT)
            cluster.say_go()
            cluster.wait_exits()
            assert len({r["digest"] for r in cluster.results()}) == 1
            committed = [(e["step"], e["generation"]) for e in cluster.events("snapshot.committed")]
            assert committed[0] == (4, 0)
            assert committed[-1] == (12, 1)
