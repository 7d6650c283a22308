"""The same command under torchrun and under autoglm-run, side by side (docs/torchrun.md has the table)."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from side_by_side import PROBE, SCRIPTS, Run, both, neutral, send_when_noted

MADE_UP = {"MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "PROBE_OUT"}
"""Variables that each run has and names differently."""

OURS = "AUTOGLM_"


def same_environment(
    theirs: Run, ours: Run, attempt: str = "0-0", *, differing: set[str] | None = None
) -> None:
    """Names and values; of those that a launcher makes up, the names."""
    differing = MADE_UP | (differing or set())
    expected, found = (
        {name: value for name, value in run.environment(attempt).items() if not name.startswith(OURS)}
        for run in (theirs, ours)
    )
    assert sorted(found) == sorted(expected)
    assert {name: found[name] for name in found.keys() - differing} == {
        name: expected[name] for name in expected.keys() - differing
    }


def same_process(theirs: Run, ours: Run, attempt: str = "0-0") -> None:
    """Everything else that the probe has looked at."""

    def seen(run: Run) -> dict[str, Any]:
        return {name: value for name, value in run.notes[attempt].items() if name != "environment"}

    assert seen(ours) == seen(theirs)


def same_logs(theirs: Run, ours: Run) -> None:
    """Layout of the log directory, and what is in the files."""
    assert {name: neutral(text) for name, text in ours.files.items() if not name.endswith("error.json")} == {
        name: neutral(text) for name, text in theirs.files.items() if not name.endswith("error.json")
    }
    assert ours.files.keys() == theirs.files.keys()


def of_workers(run: Run) -> list[str]:
    """The lines on standard error that workers wrote."""
    return sorted(line for line in run.stderr.splitlines() if "pear of rank" in line)


def same_output(theirs: Run, ours: Run) -> None:
    assert ours.stdout == theirs.stdout
    assert of_workers(ours) == of_workers(theirs)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.long
def test_defaults_with_tee_filters_and_a_prefix(tmp_path: Path) -> None:
    theirs, ours = both(
        tmp_path,
        [
            "--nproc-per-node=2", "--role=trainer", "--log-dir={logs}", "--tee=3", "--local-ranks-filter=0",
            "--duplicate-stdout-filters=apple,orange", "--duplicate-stderr-filters=pear",
            str(PROBE), "--arg", "${local_rank}", "--print-config",
        ],
        env={
            "OMP_NUM_THREADS": "UNSET",
            "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "<${role_name} ${rank} ${local_rank}> ",
        },
    )  # fmt: skip
    assert (theirs.exit_code, ours.exit_code) == (0, 0)
    assert "<trainer 0 0> apple of rank 0" in ours.stdout
    assert not any("rank 1" in line for line in ours.stdout)
    same_output(theirs, ours)
    same_logs(theirs, ours)
    for attempt in ("0-0", "0-1"):
        same_environment(theirs, ours, attempt)
        same_process(theirs, ours, attempt)
    assert "Setting OMP_NUM_THREADS environment variable" in theirs.stderr
    assert "Setting OMP_NUM_THREADS environment variable" in ours.stderr
    assert ours.notes["0-1"]["argv"][1:] == ["--arg", "1", "--print-config"]


def test_standalone_module_pet_variables_redirects_and_a_restart(tmp_path: Path) -> None:
    theirs, ours = both(
        tmp_path,
        ["--standalone", "--log-dir={logs}", "--redirects=0:1,1:2", "--tee=0:2", "-m", "probe", "arg"],
        env={"PET_NPROC_PER_NODE": "2", "PET_MAX_RESTARTS": "1", "PROBE": "fails_once"},
    )
    assert (theirs.exit_code, ours.exit_code) == (0, 0)
    assert sorted(ours.notes) == sorted(theirs.notes) == ["0-0", "0-1", "1-0", "1-1"]
    same_output(theirs, ours)
    same_logs(theirs, ours)
    for attempt in ("0-0", "1-0", "1-1"):
        same_environment(theirs, ours, attempt)
        same_process(theirs, ours, attempt)
    assert ours.environment("1-1")["TORCHELASTIC_RESTART_COUNT"] == "1"


def test_failure_with_a_recorded_exception(tmp_path: Path) -> None:
    theirs, ours = both(
        tmp_path, ["--nproc-per-node=2", "--log-dir={logs}", str(PROBE)], env={"PROBE": "recorded"}
    )
    assert (theirs.exit_code, ours.exit_code) == (1, 1)
    assert ours.summary() == theirs.summary()
    assert "RuntimeError: the disk is on fire" in "\n".join(ours.summary())
    assert ours.files.keys() == theirs.files.keys()
    assert "JOB/attempt_0/1/error.json" in ours.files
    assert theirs.error is not None
    assert ours.error is not None
    for error in (theirs.error, ours.error):
        del error["message"]["extraInfo"]["timestamp"]
    assert ours.error == theirs.error


@pytest.mark.long
@pytest.mark.parametrize(("behaviour", "said"), [("exit7", "exitcode  : 7"), ("killed", "exitcode  : -9")])
def test_failure_without_an_error_file(tmp_path: Path, behaviour: str, said: str) -> None:
    restarts = 1 if behaviour == "exit7" else 0
    theirs, ours = both(
        tmp_path,
        ["--nproc-per-node=2", f"--max-restarts={restarts}", "--log-dir={logs}", "--redirects=3", str(PROBE)],
        env={"PROBE": behaviour},
    )
    assert (theirs.exit_code, ours.exit_code) == (1, 1)
    assert ours.summary() == theirs.summary()
    assert said in "\n".join(ours.summary())
    assert sorted(ours.notes) == sorted(theirs.notes)
    assert len(ours.notes) == 2 * (restarts + 1)
    assert ours.files.keys() == theirs.files.keys()
    assert ours.error is theirs.error is None
    assert "Traceback" not in ours.stderr


@pytest.mark.long
def test_a_program_that_is_not_python(tmp_path: Path) -> None:
    theirs, ours = both(
        tmp_path,
        [
            "--nproc-per-node=2",
            "--log-dir={logs}",
            "-r",
            "1",
            "--no-python",
            "sh",
            "-c",
            'echo "$RANK of $WORLD_SIZE"',
        ],
    )
    assert (theirs.exit_code, ours.exit_code) == (0, 0)
    assert ours.files["JOB/attempt_0/1/stdout.log"] == "1 of 2\n"
    same_logs(theirs, ours)


@pytest.mark.long
def test_run_path(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, ["--log-dir={logs}", "--run-path", str(PROBE), "arg"])
    assert (theirs.exit_code, ours.exit_code) == (0, 0)
    same_environment(theirs, ours)
    same_output(theirs, ours)


def test_sigterm_and_the_shutdown_timeout(tmp_path: Path) -> None:
    theirs, ours = both(
        tmp_path,
        ["--nproc-per-node=2", "--shutdown-timeout=1", "--log-dir={logs}", "--redirects=3", str(PROBE)],
        env={"PROBE": "stubborn"},
        once_started=send_when_noted(signal.SIGTERM, 2),
    )
    told = ["term-0", "term-1"]
    assert sorted(file.name for file in theirs.out.glob("term-*")) == told
    assert [(ours.out / name).read_text() for name in told] == ["SIGTERM", "SIGTERM"]
    same_logs(theirs, ours)
    # Deliberate: torchrun shows a traceback and gives 1.
    assert (theirs.exit_code, ours.exit_code) == (1, 128 + signal.SIGTERM)
    assert "Traceback" not in ours.stderr
    assert ours.stderr.splitlines()[-1] == "autoglm-run: stopped by SIGTERM"


@pytest.mark.long
def test_elastic_nodes_with_a_c10d_endpoint(tmp_path: Path) -> None:
    theirs, ours = both(
        tmp_path,
        [
            "--nnodes=1:3", "--nproc-per-node=2", "--rdzv-backend=c10d",
            f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=job7", "--rdzv-conf=last_call_timeout=1",
            "--log-dir={logs}", "--redirects=3", str(PROBE),
        ],
    )  # fmt: skip
    assert (theirs.exit_code, ours.exit_code) == (0, 0)
    # Deliberate: a fresh store per attempt, see docs/torchrun.md.
    extra = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    assert ours.environment("0-0").pop(extra) == "1"
    for run in (theirs, ours):
        for attempt in run.notes:
            run.environment(attempt).pop(extra, None)
    same_environment(theirs, ours, differing={"TORCHELASTIC_USE_AGENT_STORE", "MASTER_ADDR"})
    same_environment(theirs, ours, "0-1", differing={"TORCHELASTIC_USE_AGENT_STORE", "MASTER_ADDR"})
    assert ours.environment("0-0")["TORCHELASTIC_RUN_ID"] == "job7"
    same_logs(theirs, ours)


@pytest.mark.long
def test_static_rendezvous_with_a_master_port(tmp_path: Path) -> None:
    port = free_port()
    theirs, ours = both(
        tmp_path,
        [
            "--nnodes=1", "--node-rank=0", "--nproc-per-node=2", "--rdzv-backend=static",
            "--master-addr=127.0.0.1", f"--master-port={port}",
            "--log-dir={logs}", "--redirects=3", str(PROBE),
        ],
    )  # fmt: skip
    assert (theirs.exit_code, ours.exit_code) == (0, 0)
    same_environment(theirs, ours)
    assert ours.environment("0-0")["MASTER_PORT"] == str(port)
    assert ours.environment("0-0")["TORCHELASTIC_RUN_ID"] == "none"
    same_logs(theirs, ours)


def test_the_docs_name_every_comparison() -> None:
    """A row of the table in the docs for each test above."""
    table = (SCRIPTS.parents[2] / "docs/torchrun.md").read_text()
    tests = [name for name in globals() if name.startswith("test_") and "docs" not in name]
    assert [name for name in tests if f"`{name}`" not in table] == []
