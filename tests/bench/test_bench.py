"""The benchmark really kills, and says what it saw; with a small model, once, under torchrun alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from autoglm_elastic.bench import recovery, restarts
from autoglm_elastic.bench.steplog import StepLog
from autoglm_elastic.errors import UsageError


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("torchrun-own-store", marks=pytest.mark.long),
        pytest.param("unmodified", marks=pytest.mark.long),
        "elastic",
    ],
)
def test_a_kill_is_measured_and_written(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recovery.main(kills=1, modes=[mode], out=tmp_path / "out", starts=0, width=64) == 0
    (kill,) = json.loads((tmp_path / "out" / "results.json").read_text())["kills"]
    assert kill["end"] == "back"
    assert 0 < kill["new_step_s"] <= kill["back_s"]
    assert kill["redone"] <= (0 if mode == "elastic" else 11)
    assert (tmp_path / "out" / "recovery.png").stat().st_size > 0
    assert (tmp_path / "out" / "results.md").read_text() in capsys.readouterr().out


def test_an_unknown_mode_is_refused_before_anything_starts() -> None:
    with pytest.raises(UsageError, match=r"mode 'horovod'; valid: torchrun"):
        recovery.main(modes=["horovod"])
    with pytest.raises(UsageError, match="mode 'horovod'"):
        restarts.main(mode="horovod")


def test_lines_are_kept_until_they_are_asked_for(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps")
    never, hold = os.pipe()
    try:
        writer = os.open(log.path, os.O_WRONLY)
        os.write(writer, b"1 step 0 1 0 7\n2 step 0 2 0 7\n3 st")
        far = time.monotonic() + 60
        assert [line.step for line in (log.line(far, never), log.line(far, never)) if line] == [1, 2]
        assert log.line(time.monotonic(), never) is None
        os.write(writer, b"ep 1 3 0 8\n")
        last = log.line(far, never)
        assert last is not None
        assert (last.rank, last.step, last.pid) == (1, 3, 8)
        os.close(writer)
    finally:
        os.close(never)
        os.close(hold)
        log.close()
