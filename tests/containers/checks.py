"""What must hold when the job is done, on its files and on those of an undisturbed run of the same training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agents import assert_chain, committed
from cluster import NODES, Cluster
from story import SIZE, Row, Story
from tools import Failed, say

EVAL_LOSS_APART_MAX = 0.005
"""Two workers add up in another order than three, so the last bits differ; other seeds end 0.04 apart."""

_FLAGS = [f"--{name.lower().replace('_', '-')}={value}" for name, value in SIZE.items()]


def check(story: Story) -> Path:
    """The run directory's copy. Raises `Failed`."""
    cluster, folder = story.cluster, story.folder
    cluster.take("n1", "/runs/.", folder / "disturbed")
    run_dir = folder / "disturbed" / "gpt"
    try:
        steps = committed(run_dir)
        assert_chain(steps)
    except AssertionError as error:
        raise Failed(f"a step is missing, or was committed twice: {error}") from error
    if len(steps) != story.steps:
        raise Failed(f"{len(steps)} steps were committed, not {story.steps}")
    say(f"every step from 1 to {story.steps} was committed once, in {steps[-1][0]} generations")
    _fenced(story.rows, run_dir)
    cluster.alone("autoglm", "ckpt", "verify", "s3://runs/gpt", "--all")
    say("every byte of the snapshots in the object store is right")
    if "done, step" not in cluster.compose("logs", "--no-log-prefix", "observer"):
        raise Failed(f"the observer did not see the end\n{cluster.logs()}")
    _stranger_is_refused(cluster)
    return run_dir


def compare(story: Story, run_dir: Path) -> None:
    """With an undisturbed run, on one worker. Raises `Failed`."""
    story.cluster.alone(
        *("autoglm-run", "--standalone", "--nproc-per-node=1", "--run-dir=/runs/undisturbed"),
        *("--module", "autoglm_elastic.examples.gpt", f"--steps={story.steps}", *_FLAGS),
        "--out=/runs/undisturbed.json",
        AUTOGLM_SNAPSHOT_URL="",
    )
    story.cluster.take("n1", "/runs/.", story.folder / "both")
    here = story.folder / "both"
    one, other = (json.loads((here / name).read_text()) for name in ("result.json", "undisturbed.json"))
    apart = abs(one["eval_loss"] - other["eval_loss"])
    curve_apart = max(abs(a - b) for a, b in _both_losses(run_dir, here / "undisturbed"))
    say(
        f"held-out loss {one['eval_loss']:.6f} after {one['step']} steps, undisturbed {other['eval_loss']:.6f} "
        f"after {other['step']}: apart by {apart:.1e}, loss curves by at most {curve_apart:.1e}"
    )
    if one["step"] != other["step"] or apart > EVAL_LOSS_APART_MAX:
        raise Failed("that is not the undisturbed result")


def _fenced(rows: list[Row], run_dir: Path) -> None:
    """Whoever was cut off had stopped before the others went on."""
    (row,) = (row for row in rows if "disconnect" in row.scenario)
    service = next(name for name in NODES if f" {name}," in row.scenario)
    left = [event for event in _events(run_dir, "node.left", row.at) if event["node"].startswith(service)]
    sealed = [
        event
        for event in _events(run_dir, "generation.sealed", row.at)
        if not any(node.startswith(service) for node in event["nodes"])
    ]
    if not left or not sealed or left[0]["wall_time"] > sealed[0]["wall_time"]:
        raise Failed(f"{service} was not fenced before the others went on: {left[:1]} {sealed[:1]}")
    say(
        f"{service} had stopped {sealed[0]['wall_time'] - left[0]['wall_time']:.2f} s before the others went on"
    )


def _stranger_is_refused(cluster: Cluster) -> None:
    try:
        cluster.alone("autoglm", "status", "etcd://e1:2379?ca=/certificates/ca.pem", "--rdzv-id=gpt")
    except Failed:
        return
    raise Failed("etcd answers to somebody without a certificate")


def _events(run_dir: Path, name: str, since: float) -> list[dict[str, Any]]:
    records = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [
        {**record["fields"], "wall_time": record["wall_time"]}
        for record in records
        if record["name"] == name and record["wall_time"] > since
    ]


def _both_losses(disturbed: Path, undisturbed: Path) -> Iterator[tuple[float, float]]:
    """But for the last step of a generation: its loss is a mean over the samples of those who are left."""
    lines, others = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (disturbed, undisturbed)
    )
    for line, after, other in zip(lines, lines[1:], others, strict=False):
        if line["generation"] == after["generation"]:
            yield line["loss"], other["loss"]
