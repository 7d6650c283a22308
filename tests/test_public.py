"""The face of the package: what a user imports, which commands there are, and what importing costs."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import autoglm_elastic as elastic

BIN = Path(sys.executable).parent
PUBLIC = ["CheckpointManager", "Job", "SafetensorsReader", "SafetensorsWriter", "WorldChanged", "run"]
JOB_ATTRIBUTES = ("rank", "world", "local_rank", "generation", "device")
JOB_METHODS = {
    "batches",
    "commit",
    "log",
    "replicate",
    "shard",
    "should_stop",
    "snapshot",
    "step",
    "track",
}


def _python(code: str) -> str:
    """What a fresh interpreter prints, with every warning an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names_are_frozen() -> None:
    assert sorted(elastic.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist_and_are_documented(name: str) -> None:
    thing = getattr(elastic, name)
    assert inspect.getdoc(thing)


def test_job_has_what_the_readme_promises_and_documents_it() -> None:
    public = {name for name in dir(elastic.Job) if not name.startswith("_")}
    assert public >= JOB_METHODS
    described = inspect.getdoc(elastic.Job) or ""
    assert [name for name in JOB_ATTRIBUTES if name not in described] == []
    assert [
        name for name in sorted(JOB_METHODS - {"step"}) if not inspect.getdoc(getattr(elastic.Job, name))
    ] == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Jobb'"):
        _ = elastic.Jobb


def test_importing_the_package_is_free() -> None:
    """No torch, no thread: a process that only reads `__version__` pays nothing."""
    code = "import sys, threading, autoglm_elastic; print('torch' in sys.modules, threading.active_count())"
    assert _python(code).split() == ["False", "1"]


def test_version_is_that_of_the_distribution() -> None:
    assert elastic.__version__ == importlib.metadata.version("autoglm-elastic")


@pytest.mark.parametrize("command", ["autoglm", "autoglm-run"])
def test_commands_explain_themselves(command: str) -> None:
    done = subprocess.run([BIN / command, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_torchrun_finds_our_rendezvous() -> None:
    (entry,) = importlib.metadata.entry_points(group="torchrun.handlers", name="autoglm")
    assert callable(entry.load())


def test_the_changelog_knows_this_version_or_has_news() -> None:
    text = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    assert "## Unreleased" in text or f"## {elastic.__version__}" in text
