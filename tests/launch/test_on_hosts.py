"""launch/local: several agents by one command, here and over (a stand-in for) ssh."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from autoglm_elastic.coordination import StoreClient, StoreDenied

REPOSITORY = Path(__file__).resolve().parents[2]
LOCAL = REPOSITORY / "launch" / "local"
TRAIN = REPOSITORY / "tests" / "e2e" / "scripts" / "train.py"
WAIT_S = 100.0

SSH = """#!/usr/bin/env bash
# A stand-in: the last two arguments are the host and what its shell is to run, in another directory.
echo "${@: -2:1}" >>"$FAKE_SSH_HOSTS"
[[ "${@: -2:1}" == *unreachable* ]] && { echo "ssh: no route to host" >&2; exit 255; }
cd / && exec sh -c "${@: -1}"
"""


class Command:
    """A command of launch/local; `reports` are the lines of JSON that workers have printed so far."""

    def __init__(self, *command: str | os.PathLike[str], **environment: str) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        self.reports: list[dict[str, Any]] = []
        self.text: list[str] = []
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            list(map(os.fspath, command)),
            env={**os.environ, "PATH": path, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        with self._news:
            assert self._news.wait_for(lambda: any(map(wanted, self.reports)), WAIT_S), self.text

    def wait(self) -> int:
        code = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        return code

    def _read(self) -> None:
        stream = self.process.stdout
        for line in stream or ():
            with self._news:
                if line.startswith("{"):
                    self.reports.append(json.loads(line))
                else:
                    self.text.append(line)
                self._news.notify_all()
        if stream is not None:
            stream.close()


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


@pytest.fixture(params=["agents", "ssh"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts two agents: here, or on two "hosts"."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(SSH)
    (programs / "ssh").chmod(0o755)
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("# the first hosts the store\n127.0.0.1\n\nsomebody@localhost  # another\n")
    ways = {"agents": (LOCAL / "agents", "2"), "ssh": (LOCAL / "ssh", hosts)}

    def start_agents(*arguments: str | os.PathLike[str]) -> Command:
        return Command(
            *ways[request.param],
            *arguments,
            PATH=f"{programs}:{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            FAKE_SSH_HOSTS=str(tmp_path / "asked"),
            AUTOGLM_PORT=free_port(),
        )

    yield start_agents
    if request.param == "ssh":
        assert set((tmp_path / "asked").read_text().split()) == {"127.0.0.1", "somebody@localhost"}


@pytest.mark.long
def test_ctrl_c_commits_a_snapshot_and_the_same_command_resumes(
    start: Callable[..., Command], run_dir: Path
) -> None:
    command: Sequence[str | os.PathLike[str]] = ("--run-dir", run_dir, TRAIN, "--steps=120", "--pause-s=0.05")
    with start(*command) as first:
        first.wait_for(lambda report: report.get("step", 0) >= 5 and report["world"] == 2)
        os.killpg(first.process.pid, signal.SIGINT)
        assert first.wait() == 75, first.text
        left_at = max(report.get("step", 0) for report in first.reports)
    assert 5 <= left_at < 120
    with start(*command) as second:
        assert second.wait() == 0, second.text
    steps = {report["step"] for report in second.reports if "step" in report}
    assert steps == set(range(left_at + 1, 121))


@pytest.mark.long
def test_agents_end_when_the_command_that_reached_them_is_gone(tmp_path: Path, run_dir: Path) -> None:
    """Over ssh there is nobody left to ask."""
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hosts.txt").write_text("localhost\n127.0.0.1\n")
    port = free_port()
    with Command(
        LOCAL / "ssh", tmp_path / "hosts.txt", "--run-dir", run_dir, TRAIN, "--steps=100000", "--pause-s=0.05",
        PATH=f"{tmp_path}:{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        FAKE_SSH_HOSTS=str(tmp_path / "asked"),
        AUTOGLM_PORT=port,
    ) as command:  # fmt: skip
        command.wait_for(lambda report: report.get("step", 0) >= 5 and report["world"] == 2)
        with pytest.raises(StoreDenied, match="it speaks TLS only"):
            StoreClient("localhost", int(port))
        command.process.kill()
        command.wait()  # the output ends when the last agent has
    assert list((run_dir / "catalog").glob("*.json")), "they left with a snapshot"


@pytest.mark.parametrize("arguments", [("agents",), ("agents", "none", "train.py"), ("ssh", "/no/file", "x")])
def test_wrong_use_is_one_line(arguments: tuple[str, ...]) -> None:
    with Command(LOCAL / arguments[0], *arguments[1:]) as command:
        assert command.wait() == 2
    assert len(command.text) == 1
    assert command.text[0].startswith(f"{arguments[0]}: usage: ")
