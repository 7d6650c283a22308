"""metrics.jsonl has a line of every step, whoever was to write it and died."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Cluster, Zygote

from autoglm_elastic.observe import metrics

STEPS = 8


@pytest.mark.parametrize("newcomers_first", [False, True], ids=["survivor", "newcomer"])
@pytest.mark.parametrize("point", ["committing", "committed"])
def test_rank_0_dies_with_lines_that_it_had_not_written(
    zygote: Zygote, tmp_path: Path, run_dir: Path, point: str, newcomers_first: bool
) -> None:
    """It dies before, or after, it takes notice of the fifth step; the others have committed it."""
    kill = {"generation": 0, "rank": 0, "point": point, "count": 5}
    args = {"steps": STEPS, "kills": [kill], "shard": False}
    with Cluster(zygote, tmp_path, "dying", args, run_dir=run_dir) as cluster:
        cluster.start(3)
        lost = cluster.alive[0]
        cluster.wait(lambda: lost.pid in zygote.exits, "death of rank 0")
        for other in cluster.alive[1:]:
            cluster.wait_said(other, trying=6)
        cluster.forget(lost)
        cluster.reform(add=1, newcomers_first=newcomers_first)
        cluster.wait_exits()
    rows = list(metrics.read(run_dir / "metrics.jsonl"))
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    assert [row.generation for row in rows] == [0] * 5 + [1] * 3
    assert all(row.loss is not None for row in rows), "the mean of those who are left, where somebody died"
