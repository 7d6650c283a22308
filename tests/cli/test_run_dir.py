"""The run directory: refusals change nothing, the lock dies with its holder, --fresh asks first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoglm_elastic.agent.run_dir import RunDirectory
from autoglm_elastic.core.lineage import entry_name
from autoglm_elastic.errors import ExitCode, UsageError


def begin(path: Path, run_id: str | None = None) -> RunDirectory:
    directory = RunDirectory(path, run_id=run_id)
    directory.begin(["autoglm-run", "train.py"])
    return directory


def populate(path: Path) -> None:
    """What two snapshots of generations 3 and 4 leave behind, and a file of the user's."""
    for folder in ("catalog", "manifests", "generations", "packs/ab", "logs"):
        (path / folder).mkdir(parents=True)
    (path / "catalog" / f"{entry_name(10, 3)}.json").write_text("{}")
    (path / "catalog" / f"{entry_name(20, 4)}.json").write_text("{}")
    (path / "generations/5.json").write_text("{}")
    (path / "packs/ab/abc.safetensors").write_bytes(bytes(3000))
    (path / "HEAD").write_text(entry_name(20, 4))
    (path / "latest").symlink_to("catalog")
    (path / "notes.txt").write_text("mine")


def tree(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


def test_it_is_created_with_a_name_of_its_own_and_resumed(run_dir: Path) -> None:
    first = begin(run_dir / "deeper")
    info = json.loads((run_dir / "deeper/run.json").read_text())
    assert info["run_id"] == first.run_id
    assert info["format_version"] == 1
    assert info["command"] == ["autoglm-run", "train.py"]
    assert "T" in info["created"]
    assert begin(run_dir / "deeper").run_id == first.run_id
    assert json.loads((run_dir / "deeper/run.json").read_text()) == info


@pytest.mark.parametrize("run_id", ["job", None])
def test_several_agents_that_begin_together_agree(run_dir: Path, run_id: str | None) -> None:
    one, other = RunDirectory(run_dir, run_id=run_id), RunDirectory(run_dir, run_id=run_id)
    one.begin([])
    other.begin([])
    assert one.run_id == other.run_id == json.loads((run_dir / "run.json").read_text())["run_id"]
    with pytest.raises(UsageError, match="not another"):
        RunDirectory(run_dir, run_id="another")
    assert sorted(os.listdir(run_dir)) == ["run.json"]


@pytest.mark.parametrize(
    ("content", "run_id", "said"),
    [
        ('{"run_id": "a", "format_version": 1, "created": ""}', "b", "belongs to run a, not b"),
        ('{"run_id": "a", "format_version": 2, "created": ""}', None, "format version 2; valid: up to 1"),
        ('{"run_id": "a"}', None, "run.json is damaged"),
        ("{", None, "run.json is damaged"),
        (" " * 70000, None, "damaged: larger than"),
    ],
)
def test_a_directory_that_is_not_ours_is_refused_and_untouched(
    run_dir: Path, content: str, run_id: str | None, said: str
) -> None:
    run_dir.mkdir()
    (run_dir / "run.json").write_text(content)
    before = tree(run_dir)
    with pytest.raises(UsageError, match=said) as caught:
        RunDirectory(run_dir, run_id=run_id)
    assert caught.value.exit_code == ExitCode.USAGE
    assert tree(run_dir) == before


@pytest.mark.parametrize("below", ["file", "file/run", "file/run/deeper"])
def test_a_path_below_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"Not a directory|not a directory"):
        RunDirectory(tmp_path / below, run_id=None)


def test_a_place_where_nothing_can_be_written_is_refused() -> None:
    with pytest.raises(UsageError, match="run directory /proc/run: "):
        RunDirectory("/proc/run", run_id=None).begin([])  # nobody, not even root, can make one there


def test_the_lock_names_its_holder_and_dies_with_it(run_dir: Path) -> None:
    hold = (
        "import sys; from autoglm_elastic.agent.run_dir import RunDirectory\n"
        "d = RunDirectory(sys.argv[1], run_id=None); d.lock(); print('locked', flush=True); sys.stdin.read()"
    )
    begin(run_dir)
    with subprocess.Popen(
        [sys.executable, "-c", hold, run_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        second = RunDirectory(run_dir, run_id=None)
        with pytest.raises(UsageError, match=f"in use by pid {holder.pid} on "):
            second.lock()
        holder.kill()
        holder.wait()
    second.lock()
    second.lock()  # holding it already
    assert f"pid {os.getpid()} on" in (run_dir / ".lock").read_text()
    second.unlock()
    second.unlock()


def test_fresh_says_what_it_would_destroy_and_spares_what_is_not_ours(run_dir: Path) -> None:
    directory = begin(run_dir)
    populate(run_dir)
    directory.lock()
    before = tree(run_dir)
    for confirmed in (None, 1, 3):
        with pytest.raises(UsageError, match=r"2 snapshots, newest of step 20, 3\.\d KiB.*--destroy=2"):
            directory.destroy(confirmed)
        assert tree(run_dir) == before
    assert directory.next_generation() == 6

    directory.destroy(2)
    assert sorted(os.listdir(run_dir)) == [".lock", "notes.txt"]
    assert directory.next_generation() == 1
    directory.destroy(None)  # nothing left: nothing to agree to
    directory.unlock()


@pytest.mark.parametrize("name", ["logs", "metrics.jsonl", "events.jsonl"])
def test_what_others_wrote_under_our_names_is_neither_written_to_nor_destroyed(
    run_dir: Path, name: str
) -> None:
    run_dir.mkdir()
    (run_dir / name).write_text("mine")
    with pytest.raises(
        UsageError, match=rf"has no run.json, so its {name} are not ours; .*another --run-dir"
    ):
        RunDirectory(run_dir, run_id=None)
    assert tree(run_dir) == {name: b"mine"}


def test_nothing_is_destroyed_without_the_lock(run_dir: Path) -> None:
    directory = begin(run_dir)
    with pytest.raises(RuntimeError, match="lock"):
        directory.destroy(0)
