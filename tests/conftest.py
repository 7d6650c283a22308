"""What every test shares: a fresh run directory, one thread a process, and proof that nothing is left behind.

Tests of this project start real processes and kill them. A process that outlives the session is a bug of the
product as often as of the test, so the session fails on it and names it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytest_plugins = ("object_store",)
os.environ.setdefault("AUTOGLM_KEEPER_LINGER_S", "3")
"""A keeper whose agent was killed by a test waits for it to come back; below LEFTOVER_GRACE_S."""
_MARK = "AUTOGLM_TEST_SESSION"
os.environ.setdefault(_MARK, uuid.uuid4().hex)
"""Inherited by whatever the tests start: finds processes that left the process tree, too."""

import psutil  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "autoglm",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("autoglm")

LEFTOVER_GRACE_S = 15.0
"""How long a process may take to end after the last test: a zygote's workers, a store's server thread."""

_PYTHONS_OWN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    chosen = f"{config.option.markexpr} {config.option.keyword}"
    if any("::" in argument for argument in config.args):
        return
    by_name = {name for name in ("campaign", "slurm", "long") if name not in chosen}
    if os.environ.get("AUTOGLM_TEST_EXCLUSIVE"):
        by_name -= {"slurm", "long"}
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in by_name)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The path of a run directory that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(scope="session", autouse=True)
def no_leftovers() -> Iterator[None]:
    """Fails the session when a process of it is alive, or (where the machine is ours) memory or a network.

    Shared memory and network namespaces carry no owner, so they are only checked where nobody else works at
    the same time: `.ci/run` says so with AUTOGLM_TEST_EXCLUSIVE.
    """
    exclusive = bool(os.environ.get("AUTOGLM_TEST_EXCLUSIVE"))
    before = _machine_wide() if exclusive else set()
    yield
    _, alive = psutil.wait_procs(_started_by_us(), timeout=LEFTOVER_GRACE_S)
    left = [f"process {process.pid}: {_command(process)}" for process in alive]
    if exclusive:
        left += sorted(_machine_wide() - before)
    if left:
        pytest.fail("left behind by the tests:\n  " + "\n  ".join(left), pytrace=False)


def _started_by_us() -> list[psutil.Process]:
    me = psutil.Process()
    family = {me.pid, *(parent.pid for parent in me.parents())}
    found = {process.pid: process for process in me.children(recursive=True)}
    mark = os.environ[_MARK]
    for process in psutil.process_iter():
        try:
            if process.pid not in family and process.environ().get(_MARK) == mark:
                found[process.pid] = process
        except psutil.Error:
            continue
    return [process for process in found.values() if not _ends_by_itself(process)]


def _ends_by_itself(process: psutil.Process) -> bool:
    """Zombies, and helpers that Python's multiprocessing ends together with this interpreter."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE or any(
            own in argument for argument in process.cmdline() for own in _PYTHONS_OWN
        )
    except psutil.Error:
        return True


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:300]
    except psutil.Error:
        return "(gone)"


def _machine_wide() -> set[str]:
    return {
        f"{path}"
        for folder in ("/dev/shm", "/run/netns")
        if os.path.isdir(folder)
        for path in Path(folder).iterdir()
    }
