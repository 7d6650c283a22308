"""Worlds of real processes for tests: one helper has imported torch and forks the ranks, which takes
milliseconds.

`python -m tests.snapshot.ranks` reads one JSON request a line ({"case", "world", "directory", "arguments"}),
runs `cases.<case>(World, **arguments)` (or `<module>.<case>`) in every rank and answers with one line: each rank's
exit status (negative for a signal) and what it returned or raised.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

RANKS_S: Final = 60.0
"""How long a world may take; then its ranks are killed and the test fails."""
REPOSITORY: Final = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """`status`: exit code, negative for a signal. `value`: JSON that the case returned. `error`: its traceback."""

    status: int
    value: Any
    error: str


class Ranks:
    """The helper process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.snapshot.ranks"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, case: str, world: int, directory: Path, **arguments: Any) -> list[Outcome]:
        """The outcome of every rank."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("no pipes")
        request = {"case": case, "world": world, "directory": str(directory), "arguments": arguments}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the helper died: {self._process.wait(10)}")
        return [Outcome(**outcome) for outcome in json.loads(line)]

    def values(self, case: str, world: int, directory: Path, **arguments: Any) -> list[Any]:
        """What every rank returned; an error of any is the test's."""
        outcomes = self.run(case, world, directory, **arguments)
        errors = [
            f"rank {rank}: {one.status}\n{one.error}" for rank, one in enumerate(outcomes) if one.status
        ]
        if errors:
            raise AssertionError("\n".join(errors))
        return [one.value for one in outcomes]

    def close(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        if self._process.stdout:
            self._process.stdout.close()


def _serve() -> None:
    import torch.distributed.checkpoint
    import torch.distributed.tensor

    from tests.snapshot import alone, cases, loads

    modules = {"cases": cases, "loads": loads, "alone": alone}
    torch.set_num_threads(1)
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        scratch = Path(request["directory"]) / f"world{number}"
        scratch.mkdir(parents=True)
        pids = []
        for rank in range(request["world"]):
            pid = os.fork()
            if pid == 0:
                _rank(modules, request, rank, scratch)
            pids.append(pid)
        statuses = _wait(pids)
        print(
            json.dumps([_outcome(scratch, rank, status) for rank, status in enumerate(statuses)]), flush=True
        )


def _rank(modules: dict[str, Any], request: dict[str, Any], rank: int, scratch: Path) -> None:
    status = 1
    try:
        world = modules["cases"].World(rank, request["world"], Path(request["directory"]), scratch)
        module, _, case = request["case"].rpartition(".")
        value = getattr(modules[module or "cases"], case)(world, **request["arguments"])
        (scratch / f"value{rank}").write_text(json.dumps(value))
        status = 0
    except BaseException:
        (scratch / f"error{rank}").write_text(traceback.format_exc())
    os._exit(status)


def _wait(pids: list[int]) -> list[int]:
    deadline = time.monotonic() + RANKS_S
    statuses = []
    for pid in pids:
        fd = os.pidfd_open(pid)
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        statuses.append(os.waitstatus_to_exitcode(status))
        os.close(fd)
    return statuses


def _outcome(scratch: Path, rank: int, status: int) -> dict[str, Any]:
    value, error = scratch / f"value{rank}", scratch / f"error{rank}"
    return {
        "status": status,
        "value": json.loads(value.read_text()) if value.exists() else None,
        "error": error.read_text() if error.exists() else "",
    }


if __name__ == "__main__":
    _serve()
