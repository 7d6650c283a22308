"""`autoglm ckpt` as a person meets it: what it prints, its JSON, its exit codes, one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autoglm_elastic.agent.run_dir import RunDirectory
from autoglm_elastic.cli.main import main

from .saved import record, save

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def filled(run_dir: Path) -> Path:
    """Steps 1 to 3 of generation 1, and one of generation 2 that nothing extends."""
    save(run_dir, 1, 2, 3, generation=1, metrics={"loss": 0.5})
    save(run_dir, 9, generation=2)
    record(run_dir, 1)
    return run_dir


def run(capsys: Capture, *argv: object) -> Any:
    """The JSON that the command prints."""
    assert main(["ckpt", *map(str, argv), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_ls_does_not_import_torch(filled: Path) -> None:
    script = (
        "import sys; from autoglm_elastic.cli.main import main;"
        f"code = main(['ckpt', 'ls', {str(filled)!r}]);"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; sys.exit(code)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert len(lines) == 4
    assert "HEAD" in lines[2]
    assert "loss=0.5" in lines[2]
    assert "fenced" in lines[3]


def test_ls_and_show_as_json(filled: Path, capsys: Capture) -> None:
    rows = run(capsys, "ls", filled)
    assert [(row["step"], row["in_lineage"], row["head"]) for row in rows] == [
        (1, True, False), (2, True, False), (3, True, True), (9, False, False),
    ]  # fmt: skip
    shown = run(capsys, "show", filled, "latest")
    assert shown["snapshot"] == rows[2]
    assert {tensor["name"]: (tensor["dtype"], tensor["shape"]) for tensor in shown["tensors"]} == {
        "model.weight": ("float32", [4, 6]),
        "model.frozen": ("bfloat16", [8]),
    }
    assert [pack["chunks"] for pack in shown["packs"]] == [2]
    assert shown["environment"]["torch"]
    assert shown["tree"]["step"] == 3
    assert main(["ckpt", "show", str(filled)]) == 0
    assert "model.weight  float32  [4, 6]  96 B" in capsys.readouterr().out


def test_tag_untag_diff(filled: Path, capsys: Capture) -> None:
    first, second = "000000000001-g1", "000000000002-g1"
    assert run(capsys, "tag", filled, "best", "1") == {"tag": "best", "entry": first, "before": None}
    assert run(capsys, "tag", filled, "best", "2") == {"tag": "best", "entry": second, "before": first}
    assert run(capsys, "ls", filled)[1]["tags"] == ["best"]
    told = run(capsys, "diff", filled, "1", "best")
    assert [change["name"] for change in told["tensors"]] == ["model.weight"]
    assert {value["path"] for value in told["values"]} == {"lr", "step"}
    assert main(["ckpt", "diff", str(filled), "1", "best"]) == 0
    assert "1 tensor and 2 values differ, 1 tensor the same" in capsys.readouterr().out
    assert run(capsys, "untag", filled, "best") == {"tag": "best", "entry": None, "before": second}


def test_verify_finds_every_damage_in_every_snapshot(filled: Path, capsys: Capture) -> None:
    assert main(["ckpt", "verify", str(filled)]) == 0
    assert capsys.readouterr().out.count("every byte verifies") == 4
    pack = filled / run(capsys, "show", filled, "2")["packs"][0]["file"]
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1  # frozen, the smaller elements, come last
    data[4096] ^= 1
    pack.write_bytes(data)
    entry = filled / "catalog" / "000000000003-g1.json"
    entry.write_bytes(entry.read_bytes()[:-1])
    assert main(["ckpt", "verify", str(filled), "--json"]) == 1
    told = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert {name for name, one in told.items() if one["ok"]} == {"000000000001-g1", "000000000009-g2"}
    assert [one["tensor"] for one in told["000000000002-g1"]["problems"]] == ["model.weight", "model.frozen"]
    assert "does not decode" in told["000000000003-g1"]["problems"][0]["reason"]
    assert main(["ckpt", "verify", str(filled), "1", "9"]) == 0
    assert main(["ckpt", "ls", str(filled)]) == 0
    assert "000000000003-g1 does not count" in capsys.readouterr().err


def test_rollback_refuses_while_a_job_runs_and_says_how_to_undo(filled: Path, capsys: Capture) -> None:
    job = RunDirectory(filled, run_id=None)
    job.lock()
    try:
        assert main(["ckpt", "rollback", str(filled), "1"]) == 2
        assert "is in use by pid" in capsys.readouterr().err
    finally:
        job.unlock()
    assert main(["ckpt", "rollback", str(filled), "1"]) == 0
    assert f"undo: autoglm ckpt rollback {filled} 000000000003-g1" in capsys.readouterr().out
    assert (filled / "HEAD").read_text() == "000000000001-g1\n"
    (event,) = map(json.loads, (filled / "events.jsonl").read_text().splitlines())
    assert event["name"] == "snapshot.rolled_back"
    assert event["fields"]["head_before"] == "000000000003-g1"
    assert [row["in_lineage"] for row in run(capsys, "ls", filled)] == [True, False, False, False]


def test_rollback_to_a_damaged_snapshot_is_refused(filled: Path, capsys: Capture) -> None:
    pack = filled / run(capsys, "show", filled, "1")["packs"][0]["file"]
    pack.unlink()
    assert main(["ckpt", "rollback", str(filled), "1"]) == 1
    assert "does not verify" in capsys.readouterr().err
    assert run(capsys, "ls", filled)[2]["head"]


def test_gc_tells_why_it_keeps_and_what_it_gives_up(filled: Path, capsys: Capture) -> None:
    keep_one = ("--set", "snapshot.keep_last=1", "--set", "snapshot.keep_every_hours=0")
    told = run(capsys, "gc", filled, *keep_one, "--dry-run")
    assert told["retired"] == ["000000000001-g1", "000000000002-g1"]
    assert told["kept"]["000000000009-g2"] == "outside of the lineage, but young"
    assert main(["ckpt", "gc", str(filled), *keep_one]) == 0
    assert "000000000003-g1: kept, HEAD" in capsys.readouterr().out
    assert [row["step"] for row in run(capsys, "ls", filled)] == [3, 9]
    told = run(capsys, "gc", filled, "--now")
    assert (told["waiting"], told["packs"]) == ([], 0), "their packs are younger than a prepare may take"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["show", "RUN", "nowhere"], "no snapshot 'nowhere'; valid: HEAD, a step, a tag or a name"),
        (["show", "RUN", "77"], "no snapshot of step 77; valid: 1, 2, 3, 9"),
        (["verify", "RUN", "77"], "no snapshot of step 77"),
        (["diff", "RUN", "1", "x"], "no snapshot 'x'"),
        (["diff", "RUN", "1"], "Missing argument 'B'"),
        (["tag", "RUN", "HEAD", "1"], "tag 'HEAD'"),
        (["untag", "RUN", "unknown"], "no tag 'unknown'"),
        (["rollback", "RUN", "HEAD"], "is HEAD"),
        (["rollback", "RUN", "9"], "of which there is no record"),
        (["gc", "RUN", "--set", "snapshot.keep=1"], "did you mean"),
        (["ls", "RUN/packs"], "is no run directory"),
        (["ls", "RUN/HEAD"], "no run directory"),
        (["ls", "RUN/missing"], "no run directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    filled: Path, capsys: Capture, argv: list[str], says: str
) -> None:
    given = [text.replace("RUN", str(filled)) for text in argv]
    assert main(["ckpt", *given]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_a_newer_format_is_named(filled: Path, capsys: Capture) -> None:
    (filled / "run.json").write_text(json.dumps({"run_id": "x", "format_version": 99, "created": "now"}))
    assert main(["ckpt", "ls", str(filled)]) == 2
    assert "format version 99" in capsys.readouterr().err
