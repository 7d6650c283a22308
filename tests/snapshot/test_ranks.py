"""Several ranks over real gloo groups: resharding, agreement, and SIGKILL at every failpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from autoglm_elastic.snapshot import CheckpointManager, Line
from tests.snapshot.cases import CHANGES
from tests.snapshot.ranks import Ranks

KILLED = -9


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    helper = Ranks()
    yield helper
    helper.close()


LAYOUTS = {
    "2": ([2], ["0"]),
    "1": ([1], ["0"]),
    "3": ([3], ["0"]),
    "3 columns": ([3], ["1"]),
    "4": ([4], ["0"]),
    "2 x 2": ([2, 2], ["0", "1"]),
    "2 x 2, twice the same dimension": ([2, 2], ["0", "0"]),
    "2 replicas of 2 shards": ([2, 2], ["R", "0"]),
    "replicated": ([3], ["R"]),
}


@pytest.mark.parametrize(
    "route",
    [
        ["2", "1", "3"],
        pytest.param(["3", "4", "2"], marks=pytest.mark.long),
        pytest.param(
            [
                "2 x 2",
                "3 columns",
                "2 replicas of 2 shards",
                "2 x 2, twice the same dimension",
                "replicated",
                "2 x 2",
            ],
            marks=pytest.mark.long,
        ),
    ],
    ids=" → ".join,
)
def test_a_snapshot_of_any_world_loads_in_any_other(ranks: Ranks, tmp_path: Path, route: list[str]) -> None:
    for step, name in enumerate(route):
        dims, placements = LAYOUTS[name]
        world = torch.Size(dims).numel()
        load = step - 1 if step else None
        results = ranks.values(
            "reshard", world, tmp_path, dims=dims, placements=placements, load=load, save=step
        )
        assert results == [[True, ""]] * world, name
    with CheckpointManager(tmp_path / "run") as manager:
        assert [entry.step for entry in manager.entries()] == list(range(len(route)))
        assert [problem for entry in manager.entries() for problem in manager.verify(entry)] == []
    for pack in (tmp_path / "run").glob("packs/*/*"):
        with safe_open(pack, "pt") as opened:
            keys = list(opened.keys())
            assert all(opened.get_tensor(key).numel() for key in keys)


def test_replicated_state_is_written_once_and_by_all(ranks: Ranks, tmp_path: Path) -> None:
    dims, placements = LAYOUTS["2"]
    ranks.values("reshard", 2, tmp_path, dims=dims, placements=placements, load=None, save=0)
    sizes = [path.stat().st_size for path in (tmp_path / "run").glob("packs/*/*")]
    assert len(sizes) == 2
    assert max(sizes) < 1.1 * min(sizes)
    assert sum(sizes) < 600_000 * 4 + 3 * 4096


def test_all_ranks_agree_on_what_is_coalesced(ranks: Ranks, tmp_path: Path) -> None:
    one, two, three = ranks.values("agree", 3, tmp_path, saves=6)
    assert one == two == three
    assert one[0]
    with CheckpointManager(tmp_path / "run") as manager:
        assert [entry.step for entry in manager.entries()] == [step for step, kept in enumerate(one) if kept]


@pytest.mark.parametrize("first", [0, 1])
def test_no_rank_waits_for_another_where_no_snapshot_is_in_flight(
    ranks: Ranks, tmp_path: Path, first: int
) -> None:
    assert ranks.values("apart", 2, tmp_path, first=first) == [[True] * 3] * 2


def test_an_agreed_trigger_is_never_coalesced(ranks: Ranks, tmp_path: Path) -> None:
    one, two = ranks.values("agreed", 2, tmp_path, saves=20)
    assert one == two
    assert all(one)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("shape", "tensor a is float32 [9] on rank 1"),
        ("object", "rank 1: state at a is a builtins.object"),
        ("extra", "tensor 'only_here': the ranks wrote"),
        ("raise", "rank 1: tensor a is a Tensor of torch.float32 on meta"),
    ],
)
def test_states_that_do_not_fit_together_abort(ranks: Ranks, tmp_path: Path, how: str, says: str) -> None:
    for committed, reason, next_committed in ranks.values("disagree", 2, tmp_path, how=how):
        assert not committed
        assert says in reason
        assert next_committed


def test_shards_that_are_copied_late_are_of_the_boundary_or_an_error(ranks: Ranks, tmp_path: Path) -> None:
    foreach, fused = {"foreach": True}, {"fused": True}
    runs: list[tuple[dict[str, bool], str]] = [(foreach, ""), (fused, "")]
    runs += [(foreach, change) for change in CHANGES]
    for results in ranks.values("sharded", 2, tmp_path, runs=runs):
        for (_, change), (committed, reason, stored_right, changed) in zip(runs, results, strict=True):
            assert changed
            assert stored_right
            assert committed == (not change), reason
            assert committed or "changed while they were copied" in reason


def test_staged_everywhere_and_killed_is_committed(ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks.run("kill_staged", 2, tmp_path, step=1)
    assert [one.status for one in outcomes] == [KILLED] * 2, outcomes
    with contextlib.closing(Line(tmp_path / "run")) as line:
        assert line.settle(60.0)
        with CheckpointManager(tmp_path / "run", line=line) as manager:
            newest = manager.newest_verified()
            assert newest is not None
            assert newest.step == 2
            loaded: dict[str, Any] = {}
            manager.load(loaded)
            assert {*loaded["a"].unique().tolist(), *loaded["b"].unique().tolist(), loaded["step"]} == {2}


OLD, NEW = False, True
KILLS = [
    (0, "staged", OLD),
    (0, "pack_written", OLD),
    (0, "packs_written", OLD),
    (0, "votes_gathered", OLD),
    (0, "manifest_written", OLD),
    (0, "entry_put", NEW),
    (0, "announced", NEW),
    (0, "hints_moved", NEW),
    (0, "decided", NEW),
    (1, "staged", OLD),
    (1, "pack_written", OLD),
    (1, "packs_written", OLD),
    (1, "vote_sent", None),
    (1, "decided", NEW),
]


@pytest.mark.parametrize(("rank", "point", "expected"), KILLS, ids=lambda value: str(value))
def test_a_rank_killed_anywhere_leaves_the_old_or_the_new(
    ranks: Ranks, tmp_path: Path, rank: int, point: str, expected: bool | None
) -> None:
    outcomes = ranks.run("kill", 2, tmp_path, rank=rank, point=point, step=1)
    assert outcomes[rank].status == KILLED
    survivor = outcomes[1 - rank]
    assert survivor.status == 0, survivor.error
    committed, reason, closed = survivor.value
    assert closed
    with CheckpointManager(tmp_path / "run") as manager:
        steps = [entry.step for entry in manager.entries()]
        assert steps in ([1], [1, 2])
        if expected is not None:
            assert steps == ([1, 2] if expected else [1])
        assert [problem for entry in manager.entries() for problem in manager.verify(entry)] == []
        target = {"a": torch.zeros(64)}
        assert manager.load(target).step == steps[-1]
        assert target["a"].unique().tolist() == [steps[-1]]
        result = manager.save(9, {"a": torch.zeros(64)}).wait(30)
        assert result.committed, "the next generation goes on in the same directory"
    if not committed:
        assert reason
        assert steps == [1] or rank == 0, "who hears nothing may not know of a commit that came later"
    else:
        assert steps == [1, 2]
