"""Workers die; the others stay alive and go on with nothing lost."""

from __future__ import annotations

from pathlib import Path

from harness import Cluster, Zygote


def undisturbed(zygote: Zygote, folder: Path, job: str, args: dict, workers: int) -> list[dict]:
    folder.mkdir()
    with Cluster(zygote, folder, job, args) as cluster:
        cluster.start(workers)
        cluster.wait_exits()
        return cluster.results()


def test_a_survivor_keeps_its_process_and_no_step_is_lost(zygote: Zygote, tmp_path: Path) -> None:
    args = {"steps": 12, "dropout": 0.2, "die": {"rank": 1, "step": 6}}
    with Cluster(zygote, tmp_path, "train", args) as cluster:
        cluster.start(2)
        survivor, doomed = cluster.alive
        cluster.wait_said(doomed, dying=6)
        cluster.kill(doomed)
        cluster.reform(add=1)
        cluster.wait_exits()
        results = cluster.results()
        assert cluster.alive[0] is survivor
        assert results[0]["entered"] == 2
        assert {r.from_step for r in cluster.resumed(1)} == {6}
        assert {r.tier for r in cluster.resumed(1)} == {"live"}
    calm = undisturbed(zygote, tmp_path / "calm", "train", args | {"die": None}, 2)
    assert [r["digest"] for r in results] == [r["digest"] for r in calm]
    assert results[0]["digest"] == results[1]["digest"]
