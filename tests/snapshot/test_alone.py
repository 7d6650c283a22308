"""CheckpointManager in a torch.distributed program without our launcher."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autoglm_elastic.core.lineage import GenerationRecord
from autoglm_elastic.errors import UsageError
from autoglm_elastic.snapshot import CheckpointManager, SingleVotes
from tests.snapshot.alone import names
from tests.snapshot.ranks import Ranks

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
RUN_S = 120.0


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    helper = Ranks()
    yield helper
    helper.close()


def packs_of(run_dir: Path, name: str, rank: int) -> list[Path]:
    """Packs that one rank has written for a snapshot."""
    with CheckpointManager(run_dir) as manager:
        manifest = manager._catalog.manifest(manager._catalog.entry(name))
    return [
        run_dir / "packs" / pack.sha256[:2] / f"{pack.sha256}.safetensors"
        for pack in manifest.packs
        if pack.rank == rank
    ]


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_all_ranks_of_the_program_take_part_and_it_goes_on_at_any_size(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.values("alone.run", 2, tmp_path, saves=[1, 2]) == [[-1, ["", ""], []]] * 2
    assert ranks.values("alone.run", 3, tmp_path, saves=[3]) == [[2, [""], []]] * 3
    assert ranks.values("alone.run", 1, tmp_path, saves=[]) == [[3, [], []]]
    assert names(tmp_path / "run") == ["000000000001-g1", "000000000002-g1", "000000000003-g2"]
    with CheckpointManager(tmp_path / "run") as manager:
        assert [entry.world_size for entry in manager.entries()] == [2, 2, 3]
        assert manager.records() == [
            GenerationRecord(1, -1, -1, None, "fresh"),
            GenerationRecord(2, 1, 2, "000000000002-g1", "disk"),
            GenerationRecord(3, 2, 3, "000000000003-g2", "disk"),
        ]


def test_what_one_rank_finds_corrupt_no_rank_resumes_from(ranks: Ranks, tmp_path: Path) -> None:
    ranks.values("alone.run", 2, tmp_path, saves=[1, 2, 3])
    for name in ("000000000003-g1", "000000000002-g1"):
        (pack,) = packs_of(tmp_path / "run", name, rank=1)
        flip_last_byte(pack)
    first, second = ranks.values("alone.run", 2, tmp_path, saves=[2, 3])
    assert first == [1, ["", ""], ["000000000003-g1", "000000000002-g1"]]
    assert second == [1, ["", ""], []]
    # Steps that were corrupt are there again, beside what was.
    assert ranks.values("alone.run", 2, tmp_path, saves=[]) == [[3, [], []]] * 2


@pytest.mark.long
def test_when_nothing_is_whole_nobody_starts_anew(ranks: Ranks, tmp_path: Path) -> None:
    ranks.values("alone.run", 2, tmp_path, saves=[1])
    (pack,) = packs_of(tmp_path / "run", "000000000001-g1", rank=1)
    flip_last_byte(pack)
    for kind, said in ranks.values("alone.fails", 2, tmp_path):
        assert kind == "CorruptSnapshot"
        assert said.startswith("none of 1 snapshots is whole; 000000000001-g1: ")
        assert pack.name in said
    assert len(list((tmp_path / "run" / "generations").iterdir())) == 1


def test_a_state_that_does_not_fit_on_one_rank_stops_all(ranks: Ranks, tmp_path: Path) -> None:
    ranks.values("alone.run", 2, tmp_path, saves=[1])
    first, second = ranks.values("alone.fails", 2, tmp_path, misfit=1)
    assert second[0] == "UsageError"
    assert first == ["PlatformError", f"rank 1: {second[1]}"]
    assert len(list((tmp_path / "run" / "generations").iterdir())) == 1


def test_what_rank_0_cannot_read_all_ranks_hear_of(ranks: Ranks, tmp_path: Path) -> None:
    ranks.values("alone.run", 2, tmp_path, saves=[1])
    record = tmp_path / "run" / "generations" / "1.json"
    record.chmod(0o644)
    record.write_text("{}")
    first, second = ranks.values("alone.fails", 2, tmp_path)
    assert first[0] == "CorruptSnapshot"
    assert first[1].startswith("generations/1.json")
    assert second == ["PlatformError", first[1]]
    (mine,), (other,) = ranks.values("alone.without_resume", 2, tmp_path, steps=[2])
    assert mine == first[1]
    assert other == f"rank 0: {mine}"


@pytest.mark.long
def test_going_back_in_the_midst_of_a_run(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.values("alone.goes_back", 2, tmp_path) == [[[""] * 4, "000000000002-g2"]] * 2
    assert ranks.values("alone.run", 2, tmp_path, saves=[]) == [[2, [], []]] * 2
    assert ranks.values("alone.run", 2, tmp_path, entry="000000000003-g1", saves=[]) == [[3, [], []]] * 2


def test_an_earlier_process_that_goes_on_does_not_count_any_more(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.values("alone.overtaken", 2, tmp_path) == [["000000000002-g2", 2]] * 2
    assert "000000000004-g1" in names(tmp_path / "run")


@pytest.mark.long
def test_the_ranks_of_a_group(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.values("alone.subgroups", 4, tmp_path)
    for rank, (committed, sizes, said) in enumerate(results):
        assert committed
        assert sizes == [2]
        assert said.startswith(f"rank {rank} is none of the process group's")


def test_without_resuming_it_writes_to_the_newest_generation(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.values("alone.without_resume", 2, tmp_path, steps=[1]) == [[""]] * 2
    assert names(tmp_path / "run") == ["000000000001-g0"]
    ranks.values("alone.run", 2, tmp_path, saves=[2])
    first, second = ranks.values("alone.without_resume", 2, tmp_path, steps=[2, 3])
    assert first[0]
    assert second[0]
    assert first[1] == second[1] == ""
    assert names(tmp_path / "run") == ["000000000001-g0", "000000000002-g1", "000000000003-g1"]


def test_ranks_that_do_not_know_of_each_other_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UsageError, match=r"WORLD_SIZE is 2, .* do: call torch.distributed.init_process_group"
    ):
        CheckpointManager(tmp_path / "run")
    with CheckpointManager(tmp_path / "run", votes=SingleVotes()) as manager:
        assert manager.save(1, {"a": torch.ones(1)}).wait(RUN_S).committed


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with CheckpointManager(tmp_path / "file" / "run") as manager:
        result = manager.save(1, {"a": torch.ones(1)}).wait(RUN_S)
        assert not result.committed
        assert manager.counts.failed == 1


@pytest.mark.long
def test_the_page_s_program_under_stock_torchrun(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    script = tmp_path / "train.py"

    def train(ranks: int, steps: int, folder: str) -> str:
        script.write_text(found[1].replace("201", str(steps + 1)))
        (tmp_path / folder).mkdir(exist_ok=True)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={ranks}",
                script,
            ],
            cwd=tmp_path / folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    train(2, 30, "apart")
    resumed = float(train(1, 60, "apart").removeprefix("loss "))
    whole = float(train(2, 60, "whole").removeprefix("loss "))
    assert resumed == pytest.approx(whole, abs=1e-5)
    entries = names(tmp_path / "apart" / "runs" / "alone")
    assert entries[0] == "000000000010-g1"
    assert entries[-1] == "000000000060-g2"
