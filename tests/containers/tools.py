"""What the trial in containers needs around it: commands with a bound, progress for people, a reason to skip."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_STARTED_AT = time.monotonic()
_TOLD_OF_A_FAILURE_CHARACTERS = 4000


class Skip(Exception):
    """It cannot be tried on this machine; says why."""


class Failed(Exception):
    """What was tried did not come out as it must."""


def say(text: str) -> None:
    print(f"{time.monotonic() - _STARTED_AT:6.1f} s  {text}", flush=True)


def run(
    *command: str | os.PathLike[str],
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    data: bytes | None = None,
    folder: Path | None = None,
) -> str:
    """Its standard output. Raises `Failed` with what it said when it fails, or is not done in time."""
    words = [os.fspath(word) for word in command]
    try:
        done = subprocess.run(
            words,
            env={**os.environ, **(env or {})},
            input=b"" if data is None else data,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            cwd=folder,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{_short(words)}: not done within {timeout_s:.0f} s\n{_end(error.stderr)}") from error
    if done.returncode:
        said = _end(done.stdout) + _end(done.stderr)
        raise Failed(f"{_short(words)}: exit code {done.returncode}\n{said}")
    return done.stdout.decode(errors="replace")


def works(*command: str, timeout_s: float = 20.0, env: Mapping[str, str] | None = None) -> bool:
    """Whether it ends with 0, in time."""
    try:
        run(*command, timeout_s=timeout_s, env=env)
    except (Failed, OSError):
        return False
    return True


def _short(words: Sequence[str]) -> str:
    return " ".join(words)[:200]


def _end(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace")[-_TOLD_OF_A_FAILURE_CHARACTERS:]
