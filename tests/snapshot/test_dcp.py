"""torch.distributed.checkpoint's own calls over the run directory, and its defects that we do not share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from autoglm_elastic.snapshot import CheckpointManager, SafetensorsReader, SafetensorsWriter
from tests.snapshot.ranks import Ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage:UserWarning"),
]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    helper = Ranks()
    yield helper
    helper.close()


def state(fill: float = 1.0) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((4, 3), fill), "scale": torch.tensor(fill), "empty": torch.zeros(0, 2)},
        "optim": {
            "state": {0: {"avg": torch.full((3,), fill, dtype=torch.bfloat16)}},
            "groups": [{"lr": fill, "betas": (fill, fill), "step": torch.tensor(fill)}],
        },
        "array": np.full(3, fill),
        "note": {"text": "x", "none": None, "list": [1, [2]]}
        if fill
        else {"text": "", "none": 0, "list": None},
    }


def equal(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)


def test_save_and_load(run_dir: Path) -> None:
    writer = SafetensorsWriter(step=3, tags=["dcp"])
    dcp.save(state(), checkpoint_id=run_dir, storage_writer=writer)
    assert writer.entry == "000000000003-g0"
    loaded = state(0.0)
    dcp.load(loaded, checkpoint_id=run_dir, storage_reader=SafetensorsReader())
    assert equal(loaded, state())
    with CheckpointManager(run_dir) as manager:
        (entry,) = manager.entries()
        assert entry.tags == ("dcp",)
        assert manager.verify(entry) == []


def test_each_save_is_a_snapshot_of_its_own(run_dir: Path) -> None:
    for fill in (1.0, 2.0, 3.0):
        dcp.save(state(fill), storage_writer=SafetensorsWriter(run_dir))
    for name, fill in (("000000000000-g0", 1.0), ("000000000002-g0", 3.0), (None, 3.0)):
        loaded = state(0.0)
        dcp.load(loaded, storage_reader=SafetensorsReader(run_dir, entry=name))
        assert equal(loaded, state(fill))


def test_a_save_is_in_the_lineage(run_dir: Path) -> None:
    with CheckpointManager(run_dir) as manager:
        manager.resume(state(0.0))
        assert manager.save(7, state()).wait(WAIT_S).committed
        writer = SafetensorsWriter(run_dir)
        dcp.save(state(2.0), storage_writer=writer)
        assert writer.entry == "000000000008-g1"
        newest = manager.newest()
        assert newest is not None
        assert newest.name == writer.entry


def test_async_save(run_dir: Path) -> None:
    live = state(1.0)
    writer = SafetensorsWriter(run_dir)
    future = dcp.async_save(live, storage_writer=writer)
    live["model"]["w"].fill_(-1)
    future.result(WAIT_S)
    loaded = state(0.0)
    dcp.load(loaded, storage_reader=SafetensorsReader(run_dir))
    assert equal(loaded, state(1.0))


def test_either_reads_what_the_other_wrote(run_dir: Path) -> None:
    with CheckpointManager(run_dir) as manager:
        assert manager.save(1, state(1.0)).wait(WAIT_S).committed
        by_dcp = state(0.0)
        dcp.load(by_dcp, storage_reader=SafetensorsReader(run_dir))
        assert equal(by_dcp, state(1.0))
        dcp.save(state(2.0), storage_writer=SafetensorsWriter(run_dir))
        by_manager = state(0.0)
        assert manager.load(by_manager).step == 2
        assert equal(by_manager, state(2.0))


def test_a_state_is_rebuilt_from_nothing(run_dir: Path) -> None:
    with CheckpointManager(run_dir) as manager:
        assert manager.save(1, state(1.0)).wait(WAIT_S).committed
    rebuilt: dict[str, Any] = {}
    _load_state_dict(
        rebuilt, storage_reader=SafetensorsReader(run_dir), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    assert torch.equal(rebuilt["optim"]["state"]["0"]["avg"], state()["optim"]["state"][0]["avg"])
    assert rebuilt["note"] == state()["note"]


def test_a_cached_plan_is_never_believed(run_dir: Path) -> None:
    """DCP keeps plans by class name and writes the dtype of an earlier state (facts: C, E)."""
    caches = ("_cached_save_plan", "_cached_final_save_plan", "_cached_all_plans", "_cached_global_plan")
    try:
        for step, dtype in enumerate((torch.float32, torch.float64)):
            dcp.save(
                {"a": torch.full((4,), 3 + step, dtype=dtype)},
                storage_writer=SafetensorsWriter(run_dir, step=step),
                planner=DefaultSavePlanner(enable_plan_caching=True),
            )
            loaded: dict[str, Any] = {}
            with CheckpointManager(run_dir) as manager:
                manager.load(loaded)
            assert loaded["a"].dtype is dtype
            assert loaded["a"].tolist() == [3 + step] * 4
    finally:
        for cache in (*caches, "_cached_metadata"):
            getattr(SavePlanner, cache).clear()


def test_a_failure_is_an_error_and_the_old_snapshot_stays(run_dir: Path) -> None:
    dcp.save(state(1.0), storage_writer=SafetensorsWriter(run_dir))
    (run_dir / "packs").rename(run_dir / "kept")
    (run_dir / "packs").write_text("no directory")
    with pytest.raises(CheckpointException, match=r"(?s)Not a directory"):
        dcp.save(state(2.0), storage_writer=SafetensorsWriter(run_dir))
    (run_dir / "packs").unlink()
    (run_dir / "kept").rename(run_dir / "packs")
    loaded = state(0.0)
    dcp.load(loaded, storage_reader=SafetensorsReader(run_dir))
    assert equal(loaded, state(1.0))


def test_what_json_cannot_hold_names_itself(run_dir: Path) -> None:
    with pytest.raises(CheckpointException, match=r"(?s)state at x is a builtins\.object.*to_state"):
        dcp.save({"x": object(), "w": torch.ones(1)}, storage_writer=SafetensorsWriter(run_dir))


def test_a_flipped_bit_is_found(run_dir: Path) -> None:
    dcp.save(state(), storage_writer=SafetensorsWriter(run_dir))
    (pack,) = run_dir.glob("packs/*/*")
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.write_bytes(data)
    with pytest.raises(CheckpointException, match=r"(?s)its digest differs"):
        dcp.load(state(0.0), storage_reader=SafetensorsReader(run_dir))


@pytest.mark.long
def test_between_worlds(ranks: Ranks, tmp_path: Path) -> None:
    def go(
        world: int, save: int | None, dims: list[int], placements: list[str], asynchronous: bool = False
    ) -> Any:
        return ranks.values(
            "dcp_round",
            world,
            tmp_path,
            save=save,
            dims=dims,
            placements=placements,
            asynchronous=asynchronous,
        )

    assert go(2, 4, [2], ["0"])[0] == "000000000004-g0"
    assert go(3, None, [3], ["1"]) == [4] * 3
    assert go(4, 5, [2, 2], ["R", "0"])[0] == "000000000005-g0"
    assert go(1, None, [1], ["0"]) == [5]
