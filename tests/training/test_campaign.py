"""Workers die at random points, one after the other and two at a time, while others recover: the job ends as if
nothing had happened.

The campaign is run by name: `pytest -m campaign tests/training/test_campaign.py`; a case is one seed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from dying import POINTS, RECOVERY_POINTS, Kill
from harness import Cluster, Worker, Zygote

from autoglm_elastic.observe import metrics

STEPS = 32
WORLD = 3
DATASET = 27
BATCH = 7
EVERY_3 = {"snapshot": {"interval_steps": 3, "interval_s": 0}}
GENERATIONS = 10


def random_kills(seed: int, shard: bool) -> list[Kill]:
    """One or two in each generation but the last."""
    draw = random.Random(seed)
    points = [p for p in POINTS if not (shard and p == "bucket")]  # FSDP2 has its own
    kills = []
    for generation in range(GENERATIONS):
        for rank in draw.sample(range(WORLD), draw.choice([1, 1, 1, 2])):
            point = draw.choice(points if generation else [p for p in points if p not in RECOVERY_POINTS])
            count = 1 if point in RECOVERY_POINTS else draw.randint(1, 3)
            kills.append({"generation": generation, "rank": rank, "point": point, "count": count})
    return kills


def play(cluster: Cluster) -> int:
    """Start, and replace whoever dies until all end; how many died."""
    died = 0
    cluster.start(WORLD)
    while True:
        cluster.wait(
            lambda: (
                all(w.pid in cluster.zygote.exits for w in cluster.alive)
                or any(cluster.zygote.exits.get(w.pid) for w in cluster.alive)
            ),
            "death or end",
        )
        lost = [w for w in cluster.alive if cluster.zygote.exits.get(w.pid)]
        if not lost:
            cluster.wait_last_words()
            return died
        for worker in lost:
            assert cluster.zygote.exits[worker.pid] == -9, (
                f"{cluster.zygote.exits[worker.pid]}\n{cluster.logs()}"
            )
            cluster.forget(worker)
        died += len(lost)
        cluster.reform(add=len(lost))


def check(cluster: Cluster, calm: list[dict[str, Any]], run_dir: Path) -> None:
    results = cluster.results()
    assert {r["step"] for r in results} == {STEPS}
    assert len({r["digest"] for r in results}) == 1
    assert results[0]["weights"] == pytest.approx(calm[0]["weights"], rel=1e-4, abs=1e-5)
    assert {r["lr"] for r in results} == {calm[0]["lr"]}
    check_samples(cluster.all)
    rows = metrics.lineage(metrics.read(run_dir / "metrics.jsonl"))
    steps = [row.step for row in rows]
    assert steps == list(range(1, STEPS + 1))


def check_samples(workers: list[Worker]) -> None:
    """Every sample once an epoch, along the newest generation of each step."""
    newest: dict[int, tuple[int, dict[int, list[int]]]] = {}
    for said in (s for w in workers for s in w.said if "trying" in s):
        step, generation = said["trying"], said["generation"]
        if step not in newest or newest[step][0] < generation:
            newest[step] = (generation, {})
        if newest[step][0] == generation:
            newest[step][1][said["rank"]] = said["indices"]
    per_epoch = -(-DATASET // BATCH)
    for first in range(1, STEPS + 1, per_epoch):
        parts = [newest[step][1] for step in range(first, first + per_epoch)]
        taken = [index for by_rank in parts for indices in by_rank.values() for index in indices]
        assert sorted(taken) == list(range(DATASET)), f"epoch that begins with step {first}"


@pytest.fixture(scope="module")
def calm(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[dict[str, Any]]]:
    """The end of an undisturbed run, replicated and sharded."""
    found = {}
    for shard in (False, True):
        args = {"steps": STEPS, "kills": [], "shard": shard}
        with Cluster(zygote, tmp_path_factory.mktemp("calm"), "dying", args) as cluster:
            assert play(cluster) == 0
            found[shard] = cluster.results()
    return found


def disturb(
    zygote: Zygote, folder: Path, run_dir: Path, kills: list[Kill], shard: bool, calm: list[dict[str, Any]]
) -> int:
    print(json.dumps(kills))
    args = {"steps": STEPS, "kills": kills, "shard": shard}
    with Cluster(zygote, folder, "dying", args, run_dir=run_dir, settings=EVERY_3) as cluster:
        died = play(cluster)
        check(cluster, calm, run_dir)
        return died


@pytest.mark.campaign
@pytest.mark.parametrize("shard", [False, True], ids=["replicate", "shard"])
@pytest.mark.parametrize("seed", range(4))
def test_random_deaths(
    zygote: Zygote,
    tmp_path: Path,
    run_dir: Path,
    calm: dict[bool, list[dict[str, Any]]],
    seed: int,
    shard: bool,
) -> None:
    died = disturb(zygote, tmp_path, run_dir, random_kills(seed, shard), shard, calm[shard])
    print(f"{died} deaths")
    assert died > 0


FIXED: list[Kill] = [
    {"generation": 0, "rank": 1, "point": "bucket", "count": 6},
    {"generation": 1, "rank": 0, "point": "restoring", "count": 1},
    {"generation": 2, "rank": 2, "point": "optimizer", "count": 3},
    {"generation": 3, "rank": 0, "point": "committing", "count": 2},
    {"generation": 3, "rank": 1, "point": "building", "count": 1},
    {"generation": 4, "rank": 0, "point": "voting", "count": 1},
    {"generation": 5, "rank": 1, "point": "stepped", "count": 2},
]


@pytest.mark.parametrize("shard", [False, True], ids=["replicate", "shard"])
def test_deaths_at_bad_moments(
    zygote: Zygote, tmp_path: Path, run_dir: Path, calm: dict[bool, list[dict[str, Any]]], shard: bool
) -> None:
    kills = [kill | {"point": "backward"} if shard and kill["point"] == "bucket" else kill for kill in FIXED]
    assert disturb(zygote, tmp_path, run_dir, kills, shard, calm[shard]) >= 5
