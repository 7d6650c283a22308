"""The example runs alone, under both launchers, and learns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SMALL = ["--layers=1", "--width=32", "--seq-len=32", "--global-batch-size=8", "--steps=6"]
GPT, DDP = "autoglm_elastic.examples.gpt", "autoglm_elastic.examples.ddp"


def _run(*command: str, out: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", *command, *SMALL, f"--out={out}"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out loss" in done.stdout
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.long
def test_alone_and_on_two_workers_it_is_the_same_training(tmp_path: Path) -> None:
    alone = _run(GPT, out=tmp_path / "alone.json")
    two = _run(
        "autoglm_elastic.cli.run", "--standalone", "--nproc-per-node=2", "-m", GPT, out=tmp_path / "two.json"
    )
    assert alone["step"] == two["step"] == 6
    assert alone["eval_loss"] < 5.545, "below a uniform guess"
    assert two["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "autoglm_elastic.cli.run"])
def test_the_plain_version_runs_under_both_launchers(launcher: str, tmp_path: Path) -> None:
    result = _run(launcher, "--standalone", "--nproc-per-node=2", "-m", DDP, out=tmp_path / "ddp.json")
    assert result["step"] == 6
    assert result["eval_loss"] < 5.545


def test_the_change_from_torchrun_is_small() -> None:
    """What a reader compares: nothing of the training itself differs."""
    folder = Path(__file__).resolve().parents[2] / "autoglm_elastic" / "examples"
    elastic, plain = ((folder / name).read_text() for name in ("gpt.py", "ddp.py"))
    for line in ("loss = model(windows)", "loss.backward()", "optim.step()", "optim.zero_grad()"):
        assert line in elastic
        assert line in plain
    assert len(elastic.splitlines()) <= len(plain.splitlines())
