"""Starts that cannot work: one clear line, the right exit code, nothing lost; exit codes of others.

Most are tried in this process, without a zygote: they are refused before any worker starts.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoglm_elastic.agent import _foreign
from autoglm_elastic.agent.run_dir import RunDirectory
from autoglm_elastic.cli.run import main
from autoglm_elastic.core.lineage import entry_name
from autoglm_elastic.errors import ExitCode
from autoglm_elastic.observe.events import read

SLEEPER = str(Path(__file__).parent / "scripts/sleeper.py")
TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launcher puts into its environment is gone after the test."""
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def refused(capfd: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the launcher says about `argv`, which gives exit code 2."""
    code = main([*argv, "--set=zygote.enabled=false", SLEEPER])
    out, err = capfd.readouterr()
    assert (code, out) == (ExitCode.USAGE, "")
    assert err.count("\n") == 1, err
    assert err.startswith("autoglm-run: ")
    return err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--nproc-per-node=many"], "Unsupported nproc_per_node value: many"),
        (["--nproc-per-node=0"], "--nproc-per-node 0; valid: a number from 1 on"),
        (["--nproc-per-node=-2"], "--nproc-per-node -2"),
        (["--max-restarts=-1"], "max_restarts must be >= 0"),
        (["--redirects=9"], "9 does not match"),
        (["--local-ranks-filter=a"], "must be a comma-separated list of integers"),
        (["--logs-specs=none-such"], "none-such"),
        (["--rdzv-backend=none-such", "--rdzv-endpoint=localhost:1"], "--rdzv-backend none-such"),
        (["--rdzv-conf=lease_s=x"], "lease_s='x'"),
        (["--rdzv-conf=nonsense"], "nonsense"),
        (["--rdzv-conf=lease=3"], "--rdzv-conf lease: no such option; do: did you mean lease_s?"),
        (["--rdzv-conf=lease_s=0.001"], "lease_s='0.001'; valid: a number, 0.05 to 3600"),
        (["--rdzv-conf=read_timeout=5,lease_s=inf"], "lease_s='inf'; valid: a number"),
        (["--shutdown-timeout=-3"], "shutdown_timeout must be non-negative"),
        (["--log-dir=/proc/none"], "/proc/none"),
    ],
)
def test_values_that_only_torch_understands(
    capfd: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert said in refused(capfd, *argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--store=tcp://node0:29400"], "the store at node0 without TLS"),
        (["--store=tcp://node0:29400"], "do: autoglm tls init DIR --host node0"),
        (["--store=tcp://node0:29400"], "or set store.insecure=true"),
        (["--rdzv-backend=autoglm", "--rdzv-endpoint=192.0.2.9:1"], "the store at 192.0.2.9 without TLS"),
        (["--store=tcp://[2001:db8::1]:1"], "the store at 2001:db8::1 without TLS"),
        (["--store=etcd://127.0.0.1:1,e2:1", "--rdzv-id=j"], "etcd at e2 without TLS: whoever reaches it"),
        (["--store=tcp://localhost:0", "--set=tls.ca=nowhere"], "tls.ca without tls.cert and tls.key"),
        (["--store=tcp://localhost:0", "--rdzv-conf=cert=a,key=b"], "tls.cert, tls.key without tls.ca"),
        (
            ["--store=tcp://h:1", "--set=tls.ca=/none/a", "--set=tls.cert=b", "--set=tls.key=c"],
            "tls.ca /none/a: No such file",
        ),
        (["--store=tcp://h:1", "--rdzv-conf=insecure=maybe"], "insecure='maybe'; valid: true or false"),
    ],
)
def test_a_store_in_the_network_needs_tls_or_a_word(
    capfd: pytest.CaptureFixture[str], run_dir: Path, argv: list[str], said: str
) -> None:
    """Before anything is started or written."""
    assert said in refused(capfd, *argv, "--nnodes=1:2", f"--run-dir={run_dir}")
    assert not run_dir.exists()


def test_a_run_directory_of_another_job(capfd: pytest.CaptureFixture[str], run_dir: Path) -> None:
    RunDirectory(run_dir, run_id="theirs").begin([])
    line = refused(capfd, f"--run-dir={run_dir}", "--rdzv-id=mine")
    assert f"{run_dir} belongs to run theirs, not mine" in line
    assert sorted(os.listdir(run_dir)) == ["run.json"]


def test_a_run_directory_of_a_newer_format(capfd: pytest.CaptureFixture[str], run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "run.json").write_text('{"run_id": "a", "format_version": 99, "created": ""}')
    assert "format version 99" in refused(capfd, f"--run-dir={run_dir}")
    assert "format version 99" in refused(capfd, f"--run-dir={run_dir}", "--fresh", "--destroy=0")


def test_a_run_directory_that_cannot_be(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "irectory" in refused(capfd, f"--run-dir={tmp_path}/file/run")


def test_fresh_asks_first(capfd: pytest.CaptureFixture[str], run_dir: Path) -> None:
    RunDirectory(run_dir, run_id="job").begin([])
    (run_dir / "catalog").mkdir()
    entry = run_dir / "catalog" / f"{entry_name(30, 1)}.json"
    entry.write_text("{}")
    line = refused(capfd, f"--run-dir={run_dir}", "--fresh")
    assert "would destroy run job" in line
    assert "1 snapshot, newest of step 30" in line
    assert "--destroy=1" in line
    assert entry.exists()


@pytest.mark.long
def test_a_port_that_is_not_a_store(capfd: pytest.CaptureFixture[str], taken_port: int) -> None:
    line = refused(capfd, f"--store=tcp://127.0.0.1:{taken_port}")
    assert f"port 127.0.0.1:{taken_port} accepts connections but says nothing" in line


def test_a_port_that_is_not_a_c10d_store(
    capfd: pytest.CaptureFixture[str], taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch itself waits for its first answer without end."""
    monkeypatch.setattr(_foreign, "SLACK_S", 1.0)
    line = refused(
        capfd, "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{taken_port}", "--rdzv-conf=read_timeout=1"
    )
    assert f"port 127.0.0.1:{taken_port} accepts connections but does not answer like a c10d store" in line


def test_a_master_port_in_use(capfd: pytest.CaptureFixture[str], taken_port: int) -> None:
    code = main(
        ["--rdzv-backend=static", f"--master-port={taken_port}", "--set=zygote.enabled=false", SLEEPER]
    )
    ours = [line for line in capfd.readouterr().err.splitlines() if line.startswith("autoglm-run: ")]
    assert code == ExitCode.FAILED
    assert len(ours) == 1
    assert "rendezvous static" in ours[0]


class Launcher:
    """A real launcher with one sleeping worker, up when the constructor returns."""

    def __init__(self, tmp_path: Path, *argv: str) -> None:
        up = tmp_path / "up"
        os.mkfifo(up)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "autoglm_elastic.cli.run", *argv, SLEEPER],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SLEEPER_UP": str(up)},
        )
        with up.open() as fifo:
            self.run_id = fifo.read()

    def end(self, number: signal.Signals) -> tuple[int, list[str]]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, err.splitlines()


def test_a_second_launcher_on_a_run_directory(
    capfd: pytest.CaptureFixture[str], run_dir: Path, tmp_path: Path
) -> None:
    first = Launcher(tmp_path, f"--run-dir={run_dir}")
    before = (run_dir / "run.json").read_bytes()
    try:
        assert json.loads(before)["run_id"] == first.run_id
        for fresh in ([], ["--fresh", "--destroy=0"]):
            line = refused(capfd, f"--run-dir={run_dir}", *fresh)
            assert f"in use by pid {first.process.pid} on {socket.gethostname()}" in line
        assert (run_dir / "run.json").read_bytes() == before
        assert first.process.poll() is None
    finally:
        code, err = first.end(signal.SIGTERM)
    assert (code, err[-1]) == (128 + signal.SIGTERM, "autoglm-run: stopped by SIGTERM")
    assert [record.name for record in read(run_dir / "events.jsonl")][-1] == "job.stopped"

    # The directory is free again; the same command goes on with the same run.
    code = subprocess.run(
        [
            sys.executable,
            "-m",
            "autoglm_elastic.cli.run",
            f"--run-dir={run_dir}",
            "--max-restarts=3",
            SLEEPER,
        ],
        env={**os.environ, "SLEEPER_CODE": "93"},
        stderr=subprocess.PIPE,
        timeout=TIMEOUT_S,
        check=False,
    ).returncode
    assert code == ExitCode.DO_NOT_RESTART
    records = list(read(run_dir / "events.jsonl"))
    assert [r.fields["run_id"] for r in records if r.name == "job.started"] == [first.run_id] * 2
    assert [r.name for r in records].count("worker.died") == 1
    assert records[-1].name == "job.failed"
    assert records[-1].fields["exit_code"] == ExitCode.DO_NOT_RESTART


@pytest.mark.long
def test_a_module_that_cannot_be_preloaded() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "autoglm_elastic.cli.run", "--preload=none_such", SLEEPER],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if line.startswith("autoglm-run: ")]
    assert done.returncode == ExitCode.USAGE
    assert len(ours) == 1
    assert "none_such" in ours[0]
    assert "Traceback" not in done.stderr
