"""The demo: its checks against a recorded run, and the whole of it by name (`pytest -m campaign`)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from autoglm_elastic.bench.demo import compare
from autoglm_elastic.bench.demo.agents import Watched
from autoglm_elastic.observe import metrics, report


def _sample() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "observe" / "sample.py"
    spec = importlib.util.spec_from_file_location("observe_sample", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _promises(run_dir: Path, **changed: Any) -> list[compare.Promise]:
    steps = list(metrics.read(run_dir / "metrics.jsonl"))
    same = compare.Outcome({"eval_loss": 2.0, "digest": "a"}, steps)
    given: dict[str, Any] = {"steps": 120, "workers": 4, "workers_gone_s": 0.01}
    given |= {"disturbed": same, "undisturbed": same} | changed
    return compare.promises(report.build(run_dir), **given)


def test_a_lost_step_breaks_a_promise_and_nothing_else(tmp_path: Path) -> None:
    _sample().write(tmp_path)
    assert [promise.text for promise in _promises(tmp_path) if not promise.kept] == ["steps lost: 0, 1"]


def test_what_did_not_happen_is_not_claimed(tmp_path: Path) -> None:
    _sample().write(tmp_path, until_step=40)
    broken = [promise.text for promise in _promises(tmp_path, workers_gone_s=None) if not promise.kept]
    assert any("trained to the end" in text for text in broken)
    assert any("left workers behind" in text for text in broken)


@pytest.mark.parametrize(("loss", "kept"), [(2.0, True), (2.0001, True), (2.1, False)])
def test_the_comparison_tells_how_far_apart_the_results_are(tmp_path: Path, loss: float, kept: bool) -> None:
    _sample().write(tmp_path)
    steps = list(metrics.read(tmp_path / "metrics.jsonl"))
    other = [msgspec.structs.replace(m, world_size=4, loss=(m.loss or 0.0) + 1e-5) for m in steps]
    promise = _promises(
        tmp_path,
        disturbed=compare.Outcome({"eval_loss": loss, "digest": "a"}, steps),
        undisturbed=compare.Outcome({"eval_loss": 2.0, "digest": "b"}, other),
    )[-1]
    assert promise.kept is kept
    assert "loss curves by at most 1.0e-05" in promise.text


def test_equal_parameters_are_said_to_be_equal(tmp_path: Path) -> None:
    _sample().write(tmp_path)
    assert "equal to the last bit" in _promises(tmp_path)[-1].text


def test_processes_are_watched_until_the_last_is_gone() -> None:
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    watched = Watched([sleeper.pid for sleeper in sleepers])
    try:
        sleepers[0].kill()
        assert watched.wait_gone(0.05) is None
        sleepers[1].kill()
        gone = watched.wait_gone(10.0)
        assert gone is not None
    finally:
        watched.close()
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait(10)


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_the_whole_demo_keeps_its_promises(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "autoglm_elastic.cli.main", "demo", "--plain", f"--out={tmp_path / 'demo'}"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✗" not in done.stdout
    assert (tmp_path / "demo" / "run" / "loss.png").stat().st_size > 20_000
