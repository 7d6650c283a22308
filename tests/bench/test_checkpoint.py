"""The checkpoint benchmark measures what it says, with a small state; and cleans up, also when it is stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
import torch

from autoglm_elastic.bench import checkpoint
from autoglm_elastic.bench.checkpoint import contenders, figures, peers, raw, saving, shards, spec, targets
from autoglm_elastic.bench.checkpoint.measure import start_group
from autoglm_elastic.bench.checkpoint.planning import extrapolated
from autoglm_elastic.bench.checkpoint.training import State, Training
from autoglm_elastic.errors import PlatformError, UsageError

SMALL = msgspec.structs.replace(spec.QUICK, mib=2, repeat=1, tensors=50)
WAIT_S = 100


@pytest.mark.long
@pytest.mark.timeout(300)
def test_saving_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "out.json", tmp_path / "disk"
    checkpoint.main(folder, ["save-sharded"], SMALL, allow_tmpfs=True, json=file, plots=tmp_path)
    told = json.loads(file.read_text())
    rows = told["parts"]["save-sharded"]
    for name in ("ours", "dcp", "dcp-reused", "torch", "safetensors"):
        assert rows[name]["wall_s"][0] >= rows[name]["durable_s"][0] > 0
        assert rows[name]["stall_s"][0] > 0
    assert rows["none"]["wall_s"][0] > 0
    assert {target["what"].partition(":")[0] for target in told["targets"]} == {"sharded"}
    assert (tmp_path / "checkpoint_save_sharded.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "| DCP async_save, thread, reused stager |" in printed
    assert not folder.exists()

    checkpoint.main(earlier=[file])
    assert capsys.readouterr().out == printed


@pytest.mark.long
@pytest.mark.timeout(300)
def test_loading_is_measured_in_another_world(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    checkpoint.main(tmp_path / "disk", ["load-1-2"], SMALL, allow_tmpfs=True, json=file)
    rows = json.loads(file.read_text())["parts"]["load-1-2"]
    assert all(
        rows[name]["warm_s"][0] > 0 for name in ("ours", "dcp", "torch", "safetensors", "read-cache-1")
    )


@pytest.mark.long
@pytest.mark.timeout(300)
def test_it_cleans_up_when_it_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "autoglm_elastic.cli.main", "bench", "checkpoint", "--quick"]
    command += ["--only", "limits", "--repeat", "1000000", "--allow-tmpfs", "--dir", str(tmp_path / "disk")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        assert any("warm-up" in line for line in running.stderr)
        (worker,) = psutil.Process(running.pid).children()
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=WAIT_S)
        assert running.returncode == 128 + signal.SIGINT
    assert not worker.is_running()
    assert not (tmp_path / "disk").exists()


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="no tmpfs here")
def test_memory_is_not_taken_for_a_disk() -> None:
    with pytest.raises(UsageError, match=r"is tmpfs, memory and no disk; do: name another"):
        checkpoint.main(Path("/dev/shm"), ["limits"], SMALL)


def test_an_unknown_part_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"part 'fast'; valid: limits, save-replicated"):
        checkpoint.main(tmp_path, ["fast"], SMALL)
    assert list(tmp_path.iterdir()) == []


def test_raw_files_hold_what_was_given(tmp_path: Path) -> None:
    memory, back = raw.warm_memory((17 << 20) + 5), raw.warm_memory(17 << 20)
    raw.fill(memory, 7)
    raw.write(tmp_path, memory, files=2, direct=False)
    assert b"".join(path.read_bytes() for path in raw.files_below(tmp_path)) == bytes(raw.view(memory))
    (tmp_path / "one").mkdir()
    raw.write(tmp_path / "one", memory, files=1, direct=False)
    raw.read(tmp_path / "one" / "raw0", back, threads=2, direct=False)
    assert torch.equal(memory, back)
    assert raw.make_warm(tmp_path) == 1.0


def test_a_single_wrong_value_is_found() -> None:
    state = shards.small(3, 64)
    shards.fill(state, 5)
    assert shards.wrong(state, 5) == []
    assert shards.wrong(state, 6) == [f"model.layer.{number}.weight" for number in range(3)]
    state["model"]["layer.1.weight"][7] += 1
    assert shards.wrong(state, 5) == ["model.layer.1.weight"]


_FOUND_OUT = 3
CHILD_S = 100.0


class _Late(contenders.Saver):
    """Keeps the live tensors and writes them when it is asked for the result: not the state of the boundary."""

    def save(self, number: int, state: State) -> contenders.Pending:
        path = self.place(number)

        class Late(contenders.Pending):
            def durable_at(self) -> float:
                peers.safetensors_save(state, path)
                return 0.0

        self.folder.mkdir(exist_ok=True)
        return Late()

    def load(self, number: int, state: State) -> None:
        peers.safetensors_load(self.place(number), state)


def _find_out(honest: bool, folder: Path) -> None:
    """In a process of its own: torch can hang for good when a reducer is dropped with its gloo group."""
    make = contenders.Safetensors if honest else _Late
    start_group(folder, 0, 1)
    training = Training(1, sharded=False)
    turns = saving.Turns([contenders.Contender("one", "one", make)], folder, training)
    if honest:
        saving.check(training, turns, turns.savers["one"])
    else:
        with pytest.raises(PlatformError, match="_Late saved other values than those of the boundary"):
            saving.check(training, turns, turns.savers["one"])
    os._exit(_FOUND_OUT)


@pytest.mark.long
@pytest.mark.parametrize("honest", [True, False])
def test_a_contender_that_saves_another_state_is_found(honest: bool, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_find_out, args=(honest, tmp_path))
    process.start()
    process.join(CHILD_S)
    try:
        assert process.exitcode == _FOUND_OUT
    finally:
        process.kill()
        process.join(CHILD_S)


def test_a_slowdown_compares_within_a_round() -> None:
    rows = {"none": {"wall_s": [1.0, 5.0, 2.0]}, "ours": {"wall_s": [1.5, 5.4, 9.0]}}
    assert figures.above_none(rows, "ours", "wall_s") == pytest.approx(0.5)
    assert figures.above_none(rows, "dcp", "wall_s") is None


def test_targets_compare_with_the_best_rival() -> None:
    windows = {
        "none": {"wall_s": [10.0]},
        "memcpy": {"stall_s": [0.1]},
        "ours": {"wall_s": [11.0], "stall_s": [0.12], "durable_s": [2.0]},
        "dcp": {"wall_s": [14.0], "stall_s": [4.0], "durable_s": [1.0]},
        "dcp-thread": {"wall_s": [11.5], "stall_s": [0.3], "durable_s": [3.0]},
    }
    judged = {target.what: target for target in targets.judge({"save-sharded": windows})}
    stall = judged["sharded: stall without overlap / memcpy"]
    assert (round(stall.ratio, 2), stall.verdict) == (1.2, "missed by a factor of 1.09")
    slow = judged["sharded: slowdown by ours / DCP async_save, thread"]
    assert (round(slow.ratio, 2), slow.met) == (0.67, False)
    assert judged["sharded: stall of ours / DCP async_save, thread"].ratio == pytest.approx(0.4)
    assert judged["sharded: durable, during training / DCP save"].ratio == pytest.approx(2.0)


def test_what_was_not_measured_is_extrapolated_from_the_largest() -> None:
    assert extrapolated({2: 100.0, 4: 1.0, 8: 3.0}, 16) == pytest.approx(7.0)
