"""A job whose snapshots lie in an object store: it loses a worker, ends, and goes on from there in an empty run
directory. Real processes, real kills, a real S3 server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from job import SCRIPTS, Job
from object_store import Bucket, Fault, Proxy, Request, moto_server, packs_read

from autoglm_elastic.cli.main import main as autoglm
from autoglm_elastic.snapshot import CheckpointManager

TRAIN = SCRIPTS / "train.py"
STEPS = 200


def start(bucket: Bucket, run_dir: Path, *arguments: str) -> Job:
    url = f"snapshot.url={bucket.url}"
    return Job(
        *(
            "--standalone",
            "--nproc-per-node=2",
            "--run-dir",
            run_dir,
            "--set",
            url,
            TRAIN,
            "--snapshot-every=10",
        ),
        *arguments,
    )


def events(run_dir: Path, name: str) -> list[dict[str, object]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [record["fields"] for record in map(json.loads, lines) if record["name"] == name]


def digests(job: Job) -> dict[int, str]:
    """Of the model at the end, by rank."""
    return {line["rank"]: line["digest"] for line in job.reports if "digest" in line}


def wait_for_snapshot(job: Job, run_dir: Path, generation: int) -> int:
    """Goes on from step to step until a snapshot of this generation is committed; its step."""
    for step in range(1, STEPS):
        job.wait_for(lambda line, step=step: line.get("step", 0) >= step)
        for fields in events(run_dir, "snapshot.committed"):
            if fields["generation"] == generation:
                return int(str(fields["step"]))
    raise AssertionError(f"no snapshot of generation {generation} in {STEPS} steps\n{job.output()}")


@pytest.mark.long
def test_a_job_goes_on_from_the_store_in_an_empty_run_directory(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    steps = f"--steps={STEPS}"
    with start(bucket, first, "--pause-s=0.03", steps) as job:
        wait_for_snapshot(job, first, 1)
        job.kill_worker(1)
        newest = wait_for_snapshot(job, first, 2)
        job.process.send_signal(signal.SIGKILL)
        job.wait()
    assert not (first / "catalog").exists()
    assert not (first / "packs").exists()

    with start(bucket, second, steps) as job:
        assert job.wait() == 0, job.output()
        end = job.wait_for(lambda line: "digest" in line)
        entered = job.wait_for(lambda line: "entered" in line)["entered"]
    assert newest <= entered < STEPS
    assert end["final"] == STEPS
    ids = {json.loads((place / "run.json").read_text())["run_id"] for place in (first, second)}
    assert len(ids) == 1, "the snapshots say whose they are"
    with Job("--standalone", "--nproc-per-node=2", TRAIN, steps) as job:
        assert job.wait() == 0, job.output()
        assert job.wait_for(lambda line: "digest" in line)["digest"] == end["digest"], "no trace"
    with CheckpointManager(bucket.url) as manager:
        numbers = [record.number for record in manager.records()]
        last = manager.newest_verified()
    assert len(numbers) >= 3
    assert last is not None
    assert last.step > newest
    assert autoglm(["ckpt", "ls", bucket.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[-1]["step"] == last.step


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--shard"]], ids=["replicas", "shards"])
def test_workers_that_begin_from_the_store_read_each_byte_once(
    bucket: Bucket, proxy: Proxy, tmp_path: Path, more: list[str]
) -> None:
    """And rank 0 once more before, which verifies the snapshot for all."""
    size = ["--hidden=40000", *more]
    with start(bucket, tmp_path / "first", "--steps=10", *size) as job:
        assert job.wait() == 0, job.output()
        trained = digests(job)
    with CheckpointManager(bucket.url) as manager:
        newest = manager.newest_verified()
    assert newest is not None
    proxy.requests.clear()
    with start(bucket, tmp_path / "second", "--steps=10", *size) as job:
        assert job.wait() == 0, job.output()
        assert job.wait_for(lambda line: "entered" in line)["entered"] == newest.step == 10
        assert digests(job) == trained, "nothing was left to train: this is what was loaded"
    heads = 0.2 * newest.nbytes
    assert 2 * newest.nbytes - heads < packs_read(proxy.requests) < 2 * newest.nbytes + heads


@pytest.mark.long
def test_a_worker_that_dies_while_all_read_together_is_replaced(
    bucket: Bucket, proxy: Proxy, tmp_path: Path
) -> None:
    second, size = tmp_path / "second", "--hidden=400000"
    with start(bucket, tmp_path / "first", "--steps=5", size) as job:
        assert job.wait() == 0, job.output()
        trained = digests(job)
    with CheckpointManager(bucket.url) as manager:
        newest = manager.newest()
    assert newest is not None
    proxy.requests.clear()

    def verified(request: Request) -> bool:
        """Rank 0 has verified everything: what is asked for now is a share."""
        if "/packs/" not in request.path or packs_read(list(proxy.requests)) < 1.2 * newest.nbytes:
            return False
        last = next(fields for fields in reversed(events(second, "worker.started")) if fields["rank"] == 1)
        os.kill(int(str(last["pid"])), signal.SIGKILL)
        return True

    kill = Fault(verified)
    proxy.faults = [kill]
    with start(bucket, second, "--steps=5", size) as job:
        assert job.wait() == 0, job.output()
        entered = [line["entered"] for line in job.reports if "entered" in line]
    assert kill.seen.is_set()
    assert {*entered} == {newest.step}
    assert digests(job) == trained
    assert [fields["rank"] for fields in events(second, "worker.died")] == [1], "nobody went down with it"


@pytest.mark.long
def test_a_store_that_dies_costs_snapshots_and_nothing_else(
    make_bucket: Callable[[str], Bucket], tmp_path: Path
) -> None:
    with moto_server() as (endpoint, server):
        bucket = make_bucket(endpoint)
        with start(bucket, tmp_path / "run", "--pause-s=0.02", "--steps=60") as job:
            job.wait_for(lambda line: line.get("step") == 12)
            server.kill()
            job.wait_for(lambda line: line.get("step") == 22)
            job.kill_worker(1)
            assert job.wait() == 0, job.output()
            end = job.wait_for(lambda line: "digest" in line)
    assert end["final"] == 60
    assert job.steps() == list(range(1, 61))
    assert [closed["tier"] for closed in events(tmp_path / "run", "incident.closed")] == ["fresh", "live"]
    assert events(tmp_path / "run", "snapshot.aborted")


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "snapshot.url=s3://bucket/run"], "without a run directory"),
        (["--run-dir=run", "--fresh", "--set", "snapshot.url=s3://bucket/run"], "--fresh does not remove"),
        (["--run-dir=run", "--set", "snapshot.url=s3://bucket/../run"], "a prefix without"),
        (["--run-dir=run", "--set", "snapshot.url=memory://run"], "memory of one process"),
        (["--run-dir=run", "--set", "snapshot.url=s3://no-such-bucket/run"], "create the bucket"),
    ],
)
def test_a_wrong_place_is_one_line_and_nothing_starts(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with Job("--standalone", *arguments, TRAIN) as job:
        assert job.wait() != 0
        assert job.reports == []
        told = [line for line in job.text if words in line]
    assert len(told) == 1, job.text
    assert not (tmp_path / "run" / "events.jsonl").exists()


@pytest.mark.long
def test_snapshots_of_another_run_are_refused(bucket: Bucket, tmp_path: Path) -> None:
    with start(bucket, tmp_path / "run", "--steps=1") as job:
        assert job.wait() == 0, job.output()
    bucket.client.copy_object(
        Bucket=bucket.name, Key="other/run.json", CopySource={"Bucket": bucket.name, "Key": "run/run.json"}
    )
    other = tmp_path / "other"
    with Job("--standalone", "--run-dir", other, TRAIN, "--steps=1") as job:
        assert job.wait() == 0, job.output()
    with start(bucket, other, "--steps=1") as job:
        assert job.wait() == 2, job.output()
        assert "belong to run" in job.output()
