"""A disk that is full or read-only for a while costs snapshots and nothing else. On a small file system of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Cluster, Zygote

from autoglm_elastic import wire

DISK_BYTES = 4 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a file system here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@contextlib.contextmanager
def full(run_dir: Path) -> Iterator[None]:
    filler = run_dir.parent / "filler"
    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@contextlib.contextmanager
def read_only(run_dir: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", run_dir, run_dir], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", run_dir], check=True)
    yield
    subprocess.run(["umount", run_dir], check=True)


@pytest.mark.parametrize("broken", [full, read_only])
def test_a_disk_that_takes_nothing_for_a_while(
    zygote: Zygote,
    tmp_path: Path,
    small_disk: Path,
    broken: type[contextlib.AbstractContextManager[None]],
) -> None:
    """Training goes on, also over a death; what could not be written is written when there is room again."""
    run_dir = small_disk / "run"
    args = {
        "steps": 16,
        "paced": True,
        "holds": [[0, 4, -1], [0, 8, -1], [0, 8, 1], [1, 12, -1]],
    }
    settings = {"snapshot": {"interval_steps": 2, "interval_s": 0}}
    with Cluster(zygote, tmp_path, "train", args, run_dir=run_dir, settings=settings) as cluster:
        cluster.start(2)
        survivor, doomed = cluster.alive
        cluster.wait_said(survivor, waiting=4)
        cluster.wait(lambda: len(cluster.events("snapshot.committed")) == 2, "two snapshots")
        with broken(run_dir):
            cluster.say_go()
            cluster.wait_said(survivor, waiting=8)
            cluster.wait_said(doomed, holding=8)
        with broken(run_dir):  # what failed snapshots gave back is filled, too
            cluster.kill(doomed)
            cluster.reform(add=1)
            cluster.say_go()
            cluster.wait_said(survivor, waiting=12)
            assert {(r.tier, r.from_step) for r in cluster.resumed(1)} == {("live", 8)}
            assert sorted(os.listdir(run_dir / "generations")) == ["0.json"]
            problems = [e["reason"] for e in cluster.events("snapshot.failed")]
            assert problems
            assert all(len(p) < 300 and "\n" not in p for p in problems)
        cluster.say_go()
        cluster.wait_exits()
        assert len({r["digest"] for r in cluster.results()}) == 1
        committed = [(e["step"], e["generation"]) for e in cluster.events("snapshot.committed")]
        assert committed == [(2, 0), (4, 0), (14, 1), (16, 1)]
        aborted = [e["step"] for e in cluster.events("snapshot.aborted")]
        assert aborted == [6, 8, 10, 12]
        assert [e["generation"] for e in cluster.events("generation.unrecorded")] == [1] * 3
    assert sorted(os.listdir(run_dir / "generations")) == ["0.json", "1.json"]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 17))


@pytest.mark.long
def test_a_start_on_a_full_disk_is_refused(zygote: Zygote, tmp_path: Path, small_disk: Path) -> None:
    run_dir = small_disk / "run"
    with Cluster(zygote, tmp_path, "train", {"steps": 4}, run_dir=run_dir) as cluster, full(run_dir):
        cluster.start(1)
        cluster.wait_exits(code=1)
        assert "could not be written" in cluster.logs()
        assert "No space left" in cluster.logs()


def test_a_stop_on_a_full_disk_tries_twice_and_says_that_nothing_is_durable(
    zygote: Zygote, tmp_path: Path, small_disk: Path
) -> None:
    run_dir = small_disk / "run"
    args = {"steps": 100_000, "ask_at": 2, "paced": True, "holds": [[0, 4, -1]]}
    with Cluster(zygote, tmp_path, "train", args, run_dir=run_dir) as cluster:
        cluster.start(2)
        first, other = cluster.alive
        cluster.wait_said(first, waiting=4)
        assert [e["step"] for e in cluster.events("snapshot.committed")] == [3]
        with full(run_dir):
            cluster.send(other, wire.Stop(signal=int(signal.SIGTERM), deadline_s=30.0))
            cluster.say_go()
            cluster.wait_exits(code=128 + signal.SIGTERM)
        done = [m for w in cluster.alive for m in w.told if isinstance(m, wire.Done)]
        assert [d.requeue for d in done] == [False, False]
        assert [e["step"] for e in cluster.events("snapshot.aborted")] == [done[0].step] * 2
