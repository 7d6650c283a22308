"""`autoglm ckpt` on a job that runs, and back to an older snapshot between two starts. Real jobs."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from job import SCRIPTS, Job

from autoglm_elastic.cli.main import main

Capture = pytest.CaptureFixture[str]


def ckpt(capsys: Capture, *argv: object) -> Any:
    code = main(["ckpt", *map(str, argv), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [record["fields"] for record in map(json.loads, lines) if record["name"] == name]


def test_every_command_works_while_a_job_writes(run_dir: Path, capsys: Capture) -> None:
    train = (SCRIPTS / "train.py", "--snapshot-every=5", "--pause-s=0.02", "--steps=100000")
    with Job("--standalone", "--nproc-per-node=2", "--run-dir", run_dir, *train) as job:
        job.wait_for(lambda line: line.get("step") == 18)
        first, second, *_ = (row["name"] for row in ckpt(capsys, "ls", run_dir))
        ckpt(capsys, "tag", run_dir, "first", first)
        assert all(one["ok"] for one in ckpt(capsys, "verify", run_dir))
        assert ckpt(capsys, "show", run_dir, "first")["snapshot"]["tags"] == ["first"]
        assert ckpt(capsys, "diff", run_dir, "first", second, "--values")["tensors"]
        assert ckpt(capsys, "gc", run_dir)["kept"][first]
        for argv in (("rollback", run_dir, "first"), ("gc", run_dir, "--now")):
            assert main(["ckpt", *map(str, argv)]) == 2
            assert "is in use by" in capsys.readouterr().err
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
    assert all(one["ok"] for one in ckpt(capsys, "verify", run_dir))


@pytest.mark.long
def test_a_start_resumes_from_where_it_was_rolled_back_to(run_dir: Path, capsys: Capture) -> None:
    command = ("--standalone", "--nproc-per-node=2", "--run-dir", run_dir, SCRIPTS / "train.py")
    with Job(*command, "--snapshot-every=10") as job:
        assert job.wait() == 0, job.output()
    digest = job.wait_for(lambda line: "digest" in line)["digest"]
    old, *_, last = ckpt(capsys, "ls", run_dir)

    ckpt(capsys, "rollback", run_dir, old["step"])
    assert events(run_dir, "snapshot.rolled_back")[0]["entry"] == old["name"]
    with Job(*command) as job:
        assert job.wait() == 0, job.output()
    assert job.steps() == list(range(old["step"] + 1, 41)), "newer snapshots are not taken"
    assert job.wait_for(lambda line: "digest" in line)["digest"] == digest
    plan = events(run_dir, "plan.decided")[-1]
    assert (plan["tier"], plan["step"]) == ("disk", old["step"])
    numbers = sorted(int(path.stem) for path in (run_dir / "generations").iterdir())
    assert numbers == [1, 2, 3], "a start, the rollback, a start"

    rows = {row["name"]: row for row in ckpt(capsys, "ls", run_dir)}
    assert not rows[last["name"]]["in_lineage"]
    ckpt(capsys, "rollback", run_dir, last["name"])
    assert [row["name"] for row in ckpt(capsys, "ls", run_dir) if row["head"]] == [last["name"]]


@pytest.mark.long
def test_a_run_resumes_from_a_snapshot_that_went_through_dcp(
    run_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    command = ("--standalone", "--nproc-per-node=2", SCRIPTS / "train.py")
    with Job("--run-dir", run_dir, *command, "--snapshot-every=10") as job:
        assert job.wait() == 0, job.output()
    digest = job.wait_for(lambda line: "digest" in line)["digest"]
    first = ckpt(capsys, "ls", run_dir)[0]
    ckpt(capsys, "export", run_dir, first["name"], tmp_path / "dcp", "--to", "dcp")
    ckpt(capsys, "import", tmp_path / "new", tmp_path / "dcp", "--step", first["step"])
    with Job("--run-dir", tmp_path / "new", *command) as job:
        assert job.wait() == 0, job.output()
    assert job.steps() == list(range(first["step"] + 1, 41))
    assert job.wait_for(lambda line: "digest" in line)["digest"] == digest


@pytest.mark.long
def test_a_job_keeps_what_it_is_told_to_keep(run_dir: Path, capsys: Capture) -> None:
    keep = ("--set", "snapshot.keep_last=2", "--set", "snapshot.keep_every_hours=0")
    train = (SCRIPTS / "train.py", "--snapshot-every=4")
    with Job("--standalone", "--nproc-per-node=2", "--run-dir", run_dir, *keep, *train) as job:
        assert job.wait() == 0, job.output()
    assert events(run_dir, "snapshot.removed")
    assert events(run_dir, "snapshot.cleanup_failed") == []
    rows = ckpt(capsys, "ls", run_dir)
    assert rows[-1]["step"] == 40
    assert len(rows) < 10, "the job ends without waiting for the last pass"
    ckpt(capsys, "gc", run_dir, *keep)
    assert len(ckpt(capsys, "ls", run_dir)) == 2
    ckpt(capsys, "verify", run_dir)
