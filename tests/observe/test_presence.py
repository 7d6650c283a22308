"""Which agents are on a run: as long as their processes live, and as far as can be seen from here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sample import write

from autoglm_elastic.observe import presence, status

HOLDER = (
    "import sys; from autoglm_elastic.observe.presence import declared\n"
    "with declared(sys.argv[1], sys.argv[2]):\n"
    "    print('here', flush=True); sys.stdin.read()\n"
)


class Holder:
    """A process that says it is an agent; there when the constructor returns."""

    def __init__(self, run_dir: Path, node: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, os.fspath(run_dir), node],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"here\n"

    def end(self, number: signal.Signals | None = None) -> None:
        if number is None:
            self.process.communicate()
        else:
            self.process.send_signal(number)
            self.process.communicate()


def _card_of_another_machine(run_dir: Path) -> None:
    (run_dir / presence.FOLDER).mkdir(exist_ok=True)
    card = {"node": "far", "host": "elsewhere", "boot": "another", "pid": 7}
    (run_dir / presence.FOLDER / "far.json").write_text(json.dumps(card))


def test_a_run_is_cut_off_when_its_last_agent_is_killed(tmp_path: Path) -> None:
    write(tmp_path, until_step=80)
    one, two = Holder(tmp_path, "a/1"), Holder(tmp_path, "b")
    assert [(agent.node, agent.pid, agent.alive) for agent in presence.read(tmp_path)] == [
        ("a/1", one.process.pid, True),
        ("b", two.process.pid, True),
    ]
    one.end(signal.SIGKILL)
    assert [agent.alive for agent in presence.read(tmp_path)] == [False, True]
    assert status.read(tmp_path).state == "running"
    two.end(signal.SIGKILL)
    told = status.read(tmp_path)
    assert (told.state, told.alive, told.step) == ("cut off", False, 80)
    assert ": cut off, step 80, " in status.lines(told)[0]


def test_agents_that_leave_take_their_files_with_them_and_sweep_those_of_the_dead(tmp_path: Path) -> None:
    killed = Holder(tmp_path, "killed")
    killed.end(signal.SIGKILL)
    _card_of_another_machine(tmp_path)
    Holder(tmp_path, "next").end()
    assert [agent.node for agent in presence.read(tmp_path)] == ["far"]


def test_of_other_machines_the_log_is_all_that_is_known(tmp_path: Path) -> None:
    write(tmp_path, until_step=80)
    _card_of_another_machine(tmp_path)
    told = status.read(tmp_path)
    assert (told.state, told.alive) == ("running", None)
    assert "by its log alone: whether its agents on elsewhere are alive" in status.lines(told)[0]


def test_a_run_that_has_ended_was_not_cut_off(tmp_path: Path) -> None:
    write(tmp_path)
    assert (status.read(tmp_path).state, status.read(tmp_path).alive) == ("done", False)


def test_what_is_no_word_of_an_agent_is_ignored(tmp_path: Path) -> None:
    (tmp_path / presence.FOLDER).mkdir()
    (tmp_path / presence.FOLDER / "a.json").write_bytes(b"\x00" * 100)
    (tmp_path / presence.FOLDER / "b.json").mkdir()
    assert presence.read(tmp_path) == []


def test_a_place_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / presence.FOLDER).touch()
    with presence.declared(tmp_path, "a"):
        assert presence.read(tmp_path) == []
    assert "no word in" in caplog.text
