"""A real `autoglm-run` and the lines its workers report, for end-to-end tests.

Workers write one JSON object per line to standard output with a single `write`; tests wait for lines, never for time.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"
Line = dict[str, Any]


class Job:
    """One agent process. `reports` are the JSON lines so far, `text` everything else that was printed. `prefix`: a
    command that becomes the one after it, in another place. `module`: of another launcher."""

    def __init__(
        self,
        *arguments: str | os.PathLike[str],
        env: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        module: str = "autoglm_elastic.cli.run",
    ) -> None:
        self.reports: list[Line] = []
        self.text: list[str] = []
        self._buffer = b""
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, *map(os.fspath, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            start_new_session=True,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def wait_for(self, wanted: Callable[[Line], bool], timeout_s: float = 60.0) -> Line:
        """The first report, past or future, that is wanted."""
        for line in self.reports:
            if wanted(line):
                return line
        seen = len(self.reports)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            more = self._read(deadline - time.monotonic())
            for line in self.reports[seen:]:
                if wanted(line):
                    return line
            seen = len(self.reports)
            if not more:
                break
        raise AssertionError(
            f"not reported within {timeout_s} s; last reports {self.reports[-8:]}\n{self.output()}"
        )

    def wait_for_text(self, wanted: str, timeout_s: float = 60.0) -> None:
        """Until something was printed that contains it."""
        deadline = time.monotonic() + timeout_s
        while not any(wanted in line for line in self.text):
            more = self._read(deadline - time.monotonic())
            if not more or time.monotonic() > deadline:
                raise AssertionError(f"{wanted!r} was not printed\n{self.output()}")

    def wait(self, timeout_s: float = 90.0) -> int:
        """Read to the end; the agent's exit code."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline - time.monotonic()):
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(
                    f"still running after {timeout_s} s; last reports {self.reports[-8:]}\n{self.output()}"
                )
        return self.process.wait(timeout=max(0.1, deadline - time.monotonic()))

    def output(self) -> str:
        return "\n".join(self.text[-60:])

    def kill_worker(self, rank: int) -> int:
        """SIGKILL the newest process that reported as `rank`; its pid."""
        pid = int(next(line["pid"] for line in reversed(self.reports) if line.get("rank") == rank))
        os.kill(pid, signal.SIGKILL)
        return pid

    def steps(self) -> list[int]:
        """Step numbers in the order that rank 0 committed them."""
        return [line["step"] for line in self.reports if line.get("rank") == 0 and "step" in line]

    def read(self) -> bool:
        """Take in what has been printed so far; never waits. False at the end of its output."""
        return self._read(0.0)

    def _read(self, timeout_s: float) -> bool:
        if self.process.stdout is None:
            return False
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, timeout_s))
        if not ready:
            return True
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            return False
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for raw in lines:
            try:
                report = json.loads(raw)
            except ValueError:
                report = None
            if isinstance(report, dict):
                self.reports.append(report)
            else:
                self.text.append(raw.decode(errors="replace"))
        return True
