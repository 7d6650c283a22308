"""Which requests may be answered by a fork. Pure: facts in, a reason or None out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from autoglm_elastic.agent._fork_safety import ZygoteFacts, fork_unsafe_reason, shadowed_module
from autoglm_elastic.agent.process import PythonScript, SpawnRequest

ENV = {"PATH": "/bin", "LD_LIBRARY_PATH": "/opt/lib"}
FACTS = ZygoteFacts(ENV, "/", flags_differ=False, cuda=False, threads=1, startup_modules=frozenset({"sys"}))
REQUEST = SpawnRequest([sys.executable, "-u", "train.py", "--lr", "1"], ENV)


def reason(
    request: SpawnRequest = REQUEST, facts: ZygoteFacts = FACTS, *, threads: int = 1, **changes: str
) -> str | None:
    request = dataclasses.replace(request, env={**request.env, **changes})
    return fork_unsafe_reason(request, facts, threads=threads)


def test_the_usual_worker_is_forked() -> None:
    assert reason() is None
    assert reason(RANK="3", MASTER_PORT="1", OMP_NUM_THREADS="1", TORCHELASTIC_RUN_ID="x") is None
    assert reason(CUDA_VISIBLE_DEVICES="1", NCCL_DEBUG="INFO", TORCH_NCCL_ASYNC_ERROR_HANDLING="1") is None


@pytest.mark.parametrize(
    "name",
    [
        *("LD_PRELOAD", "PYTHONPATH", "PYTHONHASHSEED", "MALLOC_ARENA_MAX", "KMP_AFFINITY", "OMP_PROC_BIND"),
        *("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCH_LOGS", "PYTORCH_CUDA_ALLOC_CONF", "LC_ALL"),
    ],
)
def test_what_is_read_at_the_start_must_be_equal(name: str) -> None:
    assert name in (reason(**{name: "/x"}) or "")
    facts = dataclasses.replace(FACTS, env={**ENV, name: "/x"})
    assert name in (reason(facts=facts) or "")
    assert reason(facts=facts, **{name: "/x"}) is None


def test_a_number_of_threads_cannot_be_unset() -> None:
    facts = dataclasses.replace(FACTS, env={**ENV, "OMP_NUM_THREADS": "1"})
    assert "OMP_NUM_THREADS" in (reason(facts=facts) or "")
    assert reason(facts=facts, OMP_NUM_THREADS="2") is None


def test_a_zygote_that_is_not_as_it_should_be_forks_nothing() -> None:
    assert "threads" in (reason(threads=2) or "")
    assert "CUDA" in (reason(facts=dataclasses.replace(FACTS, cuda=True)) or "")
    assert "flags" in (reason(facts=dataclasses.replace(FACTS, flags_differ=True)) or "")
    assert reason(dataclasses.replace(REQUEST, fork=False)) is not None


def test_a_relative_path_holds_only_where_it_was_meant() -> None:
    facts = dataclasses.replace(FACTS, env={**ENV, "PYTHONPATH": "src"})
    assert reason(facts=facts, PYTHONPATH="src") is None
    assert "PYTHONPATH" in (reason(dataclasses.replace(REQUEST, cwd="/dev"), facts, PYTHONPATH="src") or "")


@pytest.mark.parametrize(
    ("arguments", "script"),
    [
        (["-u", "a.py", "-m", "x"], PythonScript("a.py", ("-m", "x"), module=False)),
        (["a.py"], PythonScript("a.py", (), module=False)),
        (["-u", "-m", "pkg.mod", "-v"], PythonScript("pkg.mod", ("-v",), module=True)),
        (["-u", "-c", "pass"], None),
        (["-u", "-"], None),
        (["-O", "a.py"], None),
        (["-u", "-m"], None),
        (["-u"], None),
        ([], None),
    ],
)
def test_command_lines(arguments: list[str], script: PythonScript | None) -> None:
    assert SpawnRequest([sys.executable, *arguments], {}).python_script() == script
    assert SpawnRequest(["/usr/bin/other-python", *arguments], {}).python_script() is None


def test_modules_of_the_script_that_shadow_imported_ones(tmp_path: Path) -> None:
    assert shadowed_module(str(tmp_path), frozenset()) is None
    (tmp_path / "json").mkdir()  # a namespace package comes after every regular one
    (tmp_path / "own.py").touch()
    (tmp_path / "json.txt").touch()
    assert shadowed_module(str(tmp_path), frozenset()) is None
    (tmp_path / "json" / "__init__.py").touch()
    assert shadowed_module(str(tmp_path), frozenset()) == "json"
    assert shadowed_module(str(tmp_path), frozenset({"json"})) is None
    import json

    assert shadowed_module(str(Path(json.__file__).parents[1]), frozenset()) is None
    assert shadowed_module(str(tmp_path / "absent"), frozenset()) is None
