"""A launcher with a zygote in a process of its own, and the same command run by Python itself beside it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).resolve().parent / "scripts"
RUN_S = 60.0


@dataclass(frozen=True)
class Ended:
    """How a process ended and what it said."""

    returncode: int
    out: str
    err: str


class Launcher:
    """The process of `scripts/launcher.py`."""

    def __init__(
        self,
        folder: Path,
        *preload: str,
        env: Mapping[str, str] | None = None,
        before_exec: Callable[[], object] | None = None,
    ) -> None:
        self.folder = folder
        self.before_exec = before_exec
        self.env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})}
        self._errors = open(folder / "launcher.err", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "launcher.py"), *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=self.env,
            preexec_fn=before_exec,
        )
        self._runs = 0

    def tell(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, (self.folder / "launcher.err").read_text()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ready(self) -> int:
        """The zygote's pid, once it has imported everything."""
        return int(self.tell(op="ready")["zygote"])

    def spawn(
        self,
        command: Sequence[str],
        *,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdout: Path | None = None,
    ) -> Worker:
        self._runs += 1
        paths = {name: self.folder / f"{self._runs}.{name}" for name in ("stdin", "stdout", "stderr")}
        paths["stdin"].write_text(stdin)
        paths["stdout"] = stdout or paths["stdout"]
        if stdout is None:
            paths["stdout"].touch()
        paths["stderr"].touch()
        streams = {name: str(path) for name, path in paths.items()}
        complete = {**self.env, **(env or {})}
        answer = self.tell(op="spawn", command=list(command), env=complete, cwd=cwd, pass_fds={}, **streams)
        return Worker(self, answer["pid"], answer["fresh_because"], paths["stdout"], paths["stderr"])

    def run(self, command: Sequence[str], **rest: Any) -> Ended:
        return self.spawn(command, **rest).wait()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate(timeout=RUN_S)
        self._errors.close()


@dataclass
class Worker:
    launcher: Launcher
    pid: int
    fresh_because: str | None
    stdout: Path
    stderr: Path

    def wait(self) -> Ended:
        code = self.launcher.tell(op="wait", pid=self.pid)["returncode"]
        return Ended(code, self.stdout.read_text(), self.stderr.read_text())


def python(*arguments: str) -> list[str]:
    """The command that torchrun would execute."""
    return [sys.executable, "-u", *arguments]


def run_fresh(
    launcher: Launcher,
    command: Sequence[str],
    *,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
) -> Ended:
    """The same by Python itself, as torch starts it."""
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        env={**launcher.env, **(env or {})},
        cwd=cwd,
        start_new_session=True,
        preexec_fn=launcher.before_exec,
        timeout=RUN_S,
    )
    return Ended(done.returncode, done.stdout, done.stderr)
