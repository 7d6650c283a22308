"""The setup of both commands, on machines that lack something: one line, and what to do about it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TOOLS = ("bash", "cat", "dirname", "git", "grep", "id", "tail", "uname")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of programs: the few that every machine has, and no Python. For PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        where = shutil.which(tool)
        assert where, tool
        (folder / tool).symlink_to(where)
    return folder


def _program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a link to the machine's own program, which must not be written through
    path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
    path.chmod(0o755)


def _setup(machine: Path, command: str = "setup dev", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [machine / "bash", "-c", f"set -euo pipefail; source {REPOSITORY}/launch/_setup.sh; {command}"],
        env={"PATH": str(machine), "AUTOGLM_VENV": str(machine.parent / "venv"), **environment},
        cwd=machine,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_without_a_python_that_is_new_enough(machine: Path) -> None:
    _program(machine / "python3", "exit 1")
    done = _setup(machine)
    assert done.returncode == 1
    assert done.stderr.startswith("setup: no Python 3.11 or newer on PATH; do: install one")
    assert done.stderr.count("\n") == 1


def test_without_the_module_venv(machine: Path) -> None:
    _program(
        machine / "python3.11",
        '[[ "$2" == *ensurepip* ]] && exit 1; [[ "$2" == *%d.%d* ]] && echo 3.11; exit 0',
    )
    _program(machine / "id", "echo 1000")
    done = _setup(machine)
    assert done.returncode == 1
    assert "lacks the module venv; do: apt-get install python3.11-venv" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_of_something_else_is_not_cleared(machine: Path) -> None:
    precious = machine.parent / "venv" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years")
    _program(machine / "python3.11", "exit 0")
    done = _setup(machine)
    assert done.returncode == 1
    assert "is not a Python environment; do: name a new folder in AUTOGLM_VENV" in done.stderr
    assert precious.exists()


def test_pip_fails(machine: Path) -> None:
    python = machine.parent / "venv" / "bin" / "python"
    _program(
        python,
        '[[ "$*" == *install* ]] && { echo noise; echo "ERROR: No matching distribution"; exit 1; }; exit 0',
    )
    done = _setup(machine)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "pip could not install the project and its requirements (No matching distribution)" in last
    assert f"all of it is in {machine.parent / 'venv' / 'setup.log'}" in last


def test_the_second_time_asks_nobody(machine: Path) -> None:
    python = machine.parent / "venv" / "bin" / "python"
    _program(python, f'echo "$*" >>{machine.parent}/asked; exit 0')
    assert _setup(machine).returncode == 0
    first = (machine.parent / "asked").read_text()
    assert "install" in first
    again = _setup(machine, command="setup dev; echo $PATH")
    assert again.returncode == 0
    assert "install" not in (machine.parent / "asked").read_text()[len(first) :]
    assert again.stderr == ""
    assert again.stdout.startswith(f"{machine.parent}/venv/bin:")


def test_an_active_environment_with_torch_is_used_as_it_is(machine: Path) -> None:
    active = Path(sys.prefix)
    done = _setup(
        machine, command='choose_environment; echo "$ENVIRONMENT"', VIRTUAL_ENV=str(active), AUTOGLM_VENV=""
    )
    assert done.stdout.strip() == str(active), done.stderr


@pytest.mark.parametrize("command", ["launch/quickstart", "tests/run", ".ci/run"])
def test_commands_can_be_run(command: str) -> None:
    assert os.access(REPOSITORY / command, os.X_OK)
