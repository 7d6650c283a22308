"""House rules that a linter cannot say. Each rule is one test; its docstring is the reason."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoglm_elastic.core import lifecycle

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "autoglm_elastic"
LINES_MAX = 500

MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
SCRIPTS = PACKAGE / "bench" / "scripts"
"""What a user of torchrun would write: benchmarked, not part of the product; the rules of the house stop at
its door."""

WALL_CLOCK = {
    "autoglm_elastic/coordination/clock.py": "the clock",
    "autoglm_elastic/agent/_group.py": "stamps an event for people",
    "autoglm_elastic/training/metrics.py": "stamps a row for people",
    "autoglm_elastic/training/session.py": "stamps a commit for people",
    "autoglm_elastic/bench/jobs.py": "compares with what another process stamped",
    "autoglm_elastic/bench/kills.py": "compares with what another process stamped",
}
SLEEP = {
    "autoglm_elastic/agent/_endpoint.py": "a host that is not up yet cannot be watched",
    "autoglm_elastic/agent/agent.py": "processes of torch's own context can only be asked",
    "tests/launch/slurm_cluster.py": "Slurm can only be asked",
    "tests/cli/side_by_side.py": "files that torchrun's workers write can only be looked for",
}
PICKLES = {
    "autoglm_elastic/convert/dcp_metadata.py": "a peer's metadata; every name in them stands for a record of ours",
    "autoglm_elastic/convert/safe_load.py": "reads a peer's files with weights_only",
    "autoglm_elastic/convert/to_dcp.py": "writes a peer's format, as the peer does",
    "autoglm_elastic/bench/checkpoint/peers.py": "torch.save is what the benchmark compares with",
}
WAITS_FOR_WORK = {
    "autoglm_elastic/training/metrics.py": "a daemon thread waits for the next row as long as there is none",
}


def _name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def _house() -> list[Path]:
    return [path for path in MODULES if not path.is_relative_to(SCRIPTS)]


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name as written, call); names imported from a module are given with it: `time.sleep`."""
    origin = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            written = ast.unparse(node.func)
            yield origin.get(written, written), node


def _offending(paths: list[Path], wrong: Callable[[str, ast.Call], bool]) -> list[str]:
    return [
        f"{_name(path)}:{call.lineno}: {ast.unparse(call)[:90]}"
        for path in paths
        for name, call in _calls(path)
        if wrong(name, call)
    ]


def test_time_is_read_in_few_places() -> None:
    """Time comes in through a clock or is stamped where something is written down for people; never
    elsewhere."""
    paths = [path for path in _house() if _name(path) not in WALL_CLOCK]
    assert (
        _offending(paths, lambda name, _: name in {"time.time", "time.time_ns", "datetime.datetime.now"})
        == []
    )


def test_nothing_sleeps() -> None:
    """Whatever is waited for can be watched: a file descriptor, a condition, an event."""
    paths = [path for path in _house() if _name(path) not in SLEEP]
    assert _offending(paths, lambda name, _: name == "time.sleep") == []


def test_tests_do_not_sleep() -> None:
    """A sleep in a test is too short on a busy machine and too long on an idle one."""
    trainings = {path for path in TESTS if path.parent.name == "scripts"}  # these may be slow
    paths = [path for path in TESTS if path not in trainings and _name(path) not in SLEEP]
    assert _offending(paths, lambda name, _: name == "time.sleep") == []


def test_waits_are_bounded() -> None:
    """A wait without a bound is a hang that nobody can explain. (torch's `work.wait()` has its group's
    timeout.)"""

    def unbounded(name: str, call: ast.Call) -> bool:
        owner, _, method = name.rpartition(".")
        last = owner.rpartition(".")[2]
        if call.args or call.keywords or not owner or last == "work":
            return False
        if method == "join":
            return "thread" in last or "process" in last
        return method in {"wait", "communicate", "get", "result"}

    paths = [path for path in _house() if _name(path) not in WAITS_FOR_WORK]
    assert _offending(paths, unbounded) == []


def test_nothing_is_unpickled_or_evaluated() -> None:
    """A run directory or a peer may be hostile; reading it must never run code of it."""
    modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    paths = [path for path in _house() if _name(path) not in PICKLES]
    found = [
        f"{_name(path)}:{node.lineno}"
        for path in paths
        for node in ast.walk(_tree(path))
        if (isinstance(node, ast.Import) and modules & {alias.name.partition(".")[0] for alias in node.names})
        or (isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in modules)
    ]
    forbidden = {"eval", "torch.load", "torch.save", "yaml.unsafe_load", "numpy.load", "np.load"}
    assert found + _offending(paths, lambda name, _: name in forbidden) == []


def test_foreign_files_are_opened_without_executing_anything() -> None:
    """torch.load is called in one place of the product, and there with `weights_only`."""
    paths = [path for path in _house() if not _name(path).startswith("autoglm_elastic/bench/")]
    calls = [(path, call) for path in paths for name, call in _calls(path) if name == "torch.load"]
    assert [_name(path) for path, _ in calls] == ["autoglm_elastic/convert/safe_load.py"]
    given = {word.arg: ast.unparse(word.value) for _, call in calls for word in call.keywords}
    assert given["weights_only"] == "True"


def test_no_asserts_in_the_package() -> None:
    """`python -O` drops them; a check that must hold is raised."""
    found = [
        f"{_name(path)}:{node.lineno}"
        for path in _house()
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_modules_are_small_and_say_what_they_are_for(path: Path) -> None:
    """A reader who opens any file knows at once which room he is in. A part that outgrows one idea becomes
    two."""
    text = path.read_text()
    assert text.count("\n") <= LINES_MAX
    if text.strip():
        assert ast.get_docstring(_tree(path)), "no module docstring"


def test_every_folder_of_the_package_is_a_package() -> None:
    """A forgotten `__init__.py` hides a folder from import-linter and mypy."""
    folders = {path.parent for path in MODULES}
    assert [_name(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_no_unfinished_business() -> None:
    """What is not done is an issue, not a comment; nothing names a path of somebody's machine."""
    unfinished = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b|/home/|/root\b|/Users/|/work/")
    files = [path for path in (*MODULES, *TESTS, *_documents()) if path != Path(__file__).resolve()]
    found = [
        f"{_name(path)}:{number}: {line.strip()[:90]}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if unfinished.search(line)
    ]
    assert found == []


def _documents() -> list[Path]:
    inside = (path for folder in ("autoglm_elastic", "docs") for path in (REPOSITORY / folder).rglob("*.md"))
    return sorted([*REPOSITORY.glob("*.md"), *inside])


def test_packages_that_export_say_what() -> None:
    """A package's `__init__` shows its whole public face."""
    silent = [
        _name(path)
        for path in MODULES
        if path.name == "__init__.py"
        and any(
            isinstance(node, ast.Import | ast.ImportFrom) and not _is_future(node)
            for node in _tree(path).body
        )
        and "__all__" not in path.read_text()
    ]
    assert silent == []


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def test_imports_point_inward() -> None:
    """The contracts of pyproject.toml: the core is pure, arrows between the rooms point inward."""
    linter = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as main; main()",
            "--no-logo",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert linter.returncode == 0, linter.stdout + linter.stderr


@pytest.mark.parametrize("document", _documents(), ids=_name)
def test_documents_link_to_what_exists(document: Path) -> None:
    """A reader who follows a link arrives."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("document", _documents(), ids=_name)
def test_python_in_documents_compiles(document: Path) -> None:
    """An example that cannot be pasted is worse than none."""
    for block in re.findall(r"^```python\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE):
        compile(block, _name(document), "exec")


def test_the_lifecycle_in_the_design_is_that_of_the_code() -> None:
    """A diagram that is drawn by hand is wrong after a month."""
    assert lifecycle.diagram().strip() in (REPOSITORY / "docs" / "design.md").read_text()
