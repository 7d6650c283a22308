"""`autoglm` as a person meets it: real runs of the command, one line for every mistake."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from autoglm_elastic import settings
from autoglm_elastic.cli.main import main


def _sample() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "observe" / "sample.py"
    spec = importlib.util.spec_from_file_location("observe_sample", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    _sample().write(tmp_path)
    return tmp_path


def test_help_names_every_command_and_does_not_import_torch() -> None:
    script = (
        "import sys; from autoglm_elastic.cli.main import main; code = main(['--help']);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    for command in ("demo", "bench", "report", "status", "ckpt", "simulate", "config", "tls"):
        assert f"\n  {command} " in shown.stdout


def test_nothing_given_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("Usage: autoglm")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["rebort"], "No such command 'rebort'"),
        (["report"], "Missing argument 'RUN'"),
        (["report", "nowhere"], "no events.jsonl in nowhere"),
        (["status", "nowhere"], "no events.jsonl in nowhere"),
        (["ckpt", "ls", "nowhere"], "no run directory nowhere"),
        (["ckpt"], "Missing command"),
        (["demo", "--steps=5"], "valid: at least"),
        (["demo", "--steps=many"], "--steps"),
        (["bench", "recovery", "--mode=best"], "mode 'best'"),
        (["config", "--set", "membership.leese_s=3"], "did you mean membership.lease_s?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("autoglm: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_a_demo_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").touch()
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "is in use" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_report_as_text_json_and_picture(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(recorded)]) == 0
    assert "goodput" in capsys.readouterr().out
    png = recorded / "loss.png"
    assert main(["report", str(recorded), "--json", "--png", str(png)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [incident["steps_lost"] for incident in told["incidents"]] == [0, 1]
    assert 0 < told["goodput"] < 1
    assert png.read_bytes().startswith(b"\x89PNG")


def test_status_as_text_and_json(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(recorded)]) == 0
    assert "run demo: done, step 120" in capsys.readouterr().out
    assert main(["status", str(recorded), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["step"], told["world_size"], told["failures"]) == ("done", 120, 4, 2)
    assert [rank["pid"] for rank in told["ranks"]] == [101, 103, 203, 204]


@pytest.mark.parametrize("command", ["status", "report"])
def test_of_a_newer_format_nothing_is_told(
    recorded: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (recorded / "run.json").write_text('{"run_id": "a", "format_version": 99, "created": ""}')
    assert main([command, str(recorded)]) == 2
    assert "format version 99; valid: up to" in capsys.readouterr().err


def test_config_prints_a_file_that_gives_the_same_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--set", "membership.lease_s=5"]) == 0
    text = capsys.readouterr().out
    assert "flag --set membership.lease_s" in text
    (tmp_path / "c.yaml").write_text(text)
    assert settings.load(tmp_path / "c.yaml").settings.membership.lease_s == 5.0


def test_snapshots_are_listed_and_damage_is_found(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    from autoglm_elastic import CheckpointManager

    manager = CheckpointManager(run_dir)
    saved = manager.save(7, {"weight": torch.arange(100.0)}).wait(30)
    manager.close()
    assert saved.committed, saved.reason
    assert saved.entry is not None
    assert main(["ckpt", "ls", str(run_dir)]) == 0
    assert saved.entry in capsys.readouterr().out
    assert main(["ckpt", "ls", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["step"] == 7
    assert main(["ckpt", "verify", str(run_dir)]) == 0
    assert "every byte verifies" in capsys.readouterr().out

    (pack,) = run_dir.rglob("*.safetensors")
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    assert main(["ckpt", "verify", str(run_dir), saved.entry]) == 1
    assert "weight" in capsys.readouterr().out


def test_a_run_without_snapshots_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ckpt", "verify", str(tmp_path)]) == 0
    assert "no snapshots" in capsys.readouterr().out
