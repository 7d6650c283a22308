"""Runs one command under torchrun and then under autoglm-run, and collects what can be compared."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"
PROBE = SCRIPTS / "probe.py"
TIMEOUT_S = 90.0
LAUNCHERS = {"torchrun": "torch.distributed.run", "autoglm-run": "autoglm_elastic.cli.run"}


@dataclass(frozen=True)
class Run:
    """What one launcher did. `notes` are the probes' by "<restart>-<rank>"; `files` are those of the log
    directory, with the job's own folder called JOB."""

    exit_code: int
    stdout: list[str]
    stderr: str
    notes: dict[str, dict[str, Any]]
    files: dict[str, str]
    out: Path
    error: dict[str, Any] | None

    def environment(self, attempt: str) -> dict[str, str]:
        environment: dict[str, str] = self.notes[attempt]["environment"]
        return environment

    def summary(self) -> list[str]:
        """torch's failure summary, without times, pids and paths."""
        found = re.search(r"^torch\.distributed\.elastic\.\S*ChildFailedError: .*", self.stderr, re.M | re.S)
        assert found, self.stderr
        return neutral(found.group()).splitlines()


def neutral(text: str) -> str:
    text = re.sub(r"time      : .*", "time      : TIME", text)
    text = re.sub(r"(pid:|received by PID) \d+", r"\1 PID", text)
    text = re.sub(r"error_file: \S*/(attempt_\d+/\d+/error.json)", r"error_file: DIR/\1", text)
    return re.sub(r"^[=-]{20,}$", "----", text, flags=re.M)


def run(
    launcher: str,
    tmp_path: Path,
    arguments: list[str],
    *,
    env: Mapping[str, str] | None = None,
    once_started: Callable[[subprocess.Popen[str], Path], None] | None = None,
) -> Run:
    """`arguments` may name {logs}. `once_started` may signal the launcher."""
    root = tmp_path / launcher
    out, logs, error_file = root / "out", root / "logs", root / "error.json"
    for folder in (out, logs):
        folder.mkdir(parents=True)
    environ = {**os.environ, "PROBE_OUT": str(out), "TORCHELASTIC_ERROR_FILE": str(error_file), **(env or {})}
    environ = {name: value for name, value in environ.items() if value != "UNSET"}
    command = [sys.executable, "-m", LAUNCHERS[launcher]]
    command += [argument.replace("{logs}", str(logs)) for argument in arguments]
    with subprocess.Popen(
        command,
        env=environ,
        cwd=SCRIPTS,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            if once_started is not None:
                once_started(process, out)
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            print(*process.communicate())
            raise
    return Run(
        exit_code=process.returncode,
        stdout=sorted(stdout.splitlines()),
        stderr=stderr,
        notes={note.stem: json.loads(note.read_text()) for note in sorted(out.glob("*.json"))},
        files={
            re.sub(r"^[^/]+/(?=attempt_)", "JOB/", str(file.relative_to(logs))): file.read_text()
            for file in sorted(logs.rglob("*"))
            if file.is_file()
        },
        out=out,
        error=json.loads(error_file.read_text()) if error_file.exists() else None,
    )


def both(tmp_path: Path, arguments: list[str], **options: Any) -> tuple[Run, Run]:
    """(torchrun's, ours)."""
    theirs, ours = (run(launcher, tmp_path, arguments, **options) for launcher in LAUNCHERS)
    return theirs, ours


def send_when_noted(number: signal.Signals, notes: int) -> Callable[[subprocess.Popen[str], Path], None]:
    """For `once_started`: a signal to the launcher as soon as so many workers are up."""

    def send(process: subprocess.Popen[str], out: Path) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while len(list(out.glob("*.json"))) < notes:
            if time.monotonic() > deadline or process.poll() is not None:
                raise AssertionError(f"{notes} workers were not up within {TIMEOUT_S} s")
            time.sleep(0.02)
        process.send_signal(number)

    return send
