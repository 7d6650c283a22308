"""Whole jobs over TLS, at an address of this machine that others could reach: they recover, grow, take up rotated
certificates, and let nobody in without one."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from agents import assert_each_step_once, events, free_port, wait, wait_for
from certificates import files_in, flags_for, foreign, made
from etcd_cluster import Cluster, needs_etcd
from job import SCRIPTS, Job

from autoglm_elastic.coordination import Credentials, StoreClient, TlsFiles, authority

TRAIN = (str(SCRIPTS / "train.py"), "--pause-s=0.02")
WAIT_S = 60.0


def _reachable_address() -> str:
    """One of this machine's addresses that is not loopback; the loopback where it has none."""
    found = (
        each.address
        for addresses in psutil.net_if_addrs().values()
        for each in addresses
        if each.family == socket.AF_INET and not each.address.startswith("127.")
    )
    return next(found, "127.0.0.1")


ADDRESS = _reachable_address()
needs_a_network = pytest.mark.skipif(ADDRESS == "127.0.0.1", reason="no address besides loopback")


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    made(tmp_path / "tls", ADDRESS)
    return tmp_path / "tls"


HOSTS = "--rdzv-conf=is_host=1"
"""The name of the machine need not lead to this address."""


def flags(port: int, run_dir: Path, *more: str, nodes: str = "1:2") -> tuple[str, ...]:
    return (
        f"--nnodes={nodes}", "--nproc-per-node=1", f"--store=tcp://{ADDRESS}:{port}", "--rdzv-id=tls",
        f"--run-dir={run_dir}", *more, *TRAIN,
    )  # fmt: skip


def autoglm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autoglm_elastic.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.mark.long
def test_a_job_over_tls_loses_a_worker_takes_up_new_certificates_and_lets_a_node_in(
    tls: Path, tmp_path: Path, run_dir: Path
) -> None:
    port = free_port()
    given = flags_for(files_in(tls))
    first = Job(*flags(port, run_dir, HOSTS, *given, nodes="2:3"), "--steps=100000")
    other = Job(*flags(port, run_dir, *given, nodes="2:3"), "--steps=100000")
    with first, other:
        wait_for([first], lambda line: line.get("step", 0) >= 5 and line["world"] == 2)
        # A worker is lost, and replaced.
        killed = other.kill_worker(other.wait_for(lambda line: "rank" in line)["rank"])
        other.wait_for(lambda line: line.get("pid", killed) != killed)
        # Somebody without a certificate, with one of another CA, and with ours.
        store = f"{ADDRESS}:{port}"
        refused = autoglm("status", store, "--rdzv-id=tls", "--set=store.insecure=true")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "it speaks TLS only" in refused.stderr
        alien = autoglm("status", store, "--rdzv-id=tls", *flags_for(foreign(tmp_path / "alien", ADDRESS)))
        assert (alien.returncode, alien.stderr.count("\n")) == (2, 1)
        assert "has a certificate that we do not accept" in alien.stderr
        seen = autoglm("status", store, "--rdzv-id=tls", *given)
        assert seen.returncode == 0, seen.stderr
        # Certificates are rotated while it runs: who comes now is shown the new ones.
        old = (tls / authority.CERT).read_bytes()
        authority.renew(tls, (), days=1)
        assert (tls / authority.CERT).read_bytes() != old
        with Job(*flags(port, run_dir, *given, nodes="2:3"), "--steps=100000") as third:
            wait_for([third], lambda line: line.get("world") == 3 and "step" in line)
            with closing(StoreClient(ADDRESS, port, credentials=Credentials(files_in(tls)))) as client:
                assert client.get_prefix("/")[0]
            first.process.send_signal(signal.SIGTERM)
            assert wait(first, other, third) == [75, 75, 75], first.output()
    assert_each_step_once(run_dir)
    assert len(events(run_dir, "incident.closed")) >= 2, "the start, and the lost worker"


@pytest.mark.long
@needs_a_network
def test_agents_without_a_certificate_do_not_get_into_a_job(tls: Path, tmp_path: Path, run_dir: Path) -> None:
    port = free_port()
    alien = foreign(tmp_path / "alien", ADDRESS)
    both = tmp_path / "both.pem"
    both.write_bytes(Path(alien.ca).read_bytes() + (tls / authority.CA).read_bytes())
    knows_us = TlsFiles(str(both), alien.cert, alien.key)
    cases = (
        ((), 2, "without TLS: whoever reaches it over the network could read and command the job"),
        (("--set=store.insecure=true",), 2, "it speaks TLS only"),
        (flags_for(knows_us), 2, "does not accept our certificate: unknown ca"),
    )
    with Job(*flags(port, run_dir, HOSTS, *flags_for(files_in(tls))), "--steps=100000") as host:
        host.wait_for(lambda line: "step" in line)
        for given, code, line in cases:
            with Job(*flags(port, run_dir, *given, "--rdzv-conf=is_host=0")) as job:
                assert job.wait() == code, job.output()
                assert line in job.output()
        step = host.reports[-1]["step"]
        host.wait_for(lambda line: line.get("step", 0) > step)
        host.process.send_signal(signal.SIGTERM)
        assert host.wait() == 75
    assert len(events(run_dir, "generation.sealed")) == 1, "nobody noticed them"


@pytest.mark.long
@needs_a_network
def test_plain_off_loopback_works_when_asked_for(run_dir: Path) -> None:
    insecure = "--set=store.insecure=true"
    with Job(*flags(free_port(), run_dir, HOSTS, insecure, nodes="1:1"), "--steps=5") as job:
        assert job.wait() == 0, job.output()


@pytest.mark.long
def test_stock_torchrun_takes_the_files_too(tls: Path, tmp_path: Path) -> None:
    files = files_in(tls)
    conf = f"ca={files.ca},cert={files.cert},key={files.key},join_window_s=0.2"
    script = tmp_path / "says.py"
    script.write_text("print('trained')\n")
    common = (
        "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=autoglm", "--rdzv-id=t",
        f"--rdzv-endpoint={ADDRESS}:{free_port()}",
    )  # fmt: skip
    module = "torch.distributed.run"
    hosting, joining = f"--rdzv-conf={conf},is_host=1", f"--rdzv-conf={conf},is_host=0"
    with (
        Job(*common, hosting, script, module=module) as one,
        Job(*common, joining, script, module=module) as other,
    ):
        assert wait(one, other) == [0, 0], one.output() + other.output()
        assert "trained" in one.output()


@pytest.mark.long
@needs_etcd
def test_the_same_settings_count_for_etcd(tls: Path, tmp_path: Path, run_dir: Path) -> None:
    files = files_in(tls)
    options = (
        f"--cert-file={files.cert}", f"--key-file={files.key}", f"--trusted-ca-file={files.ca}", "--client-cert-auth",
    )  # fmt: skip
    with Cluster(tmp_path / "etcd", options=options, scheme="https") as cluster:
        common = (
            "--nnodes=1", "--nproc-per-node=1", "--store", cluster.address, "--rdzv-id=tls",
            "--set=membership.join_timeout_s=2",
        )  # fmt: skip
        with Job(*common, *flags_for(files), f"--run-dir={run_dir}", *TRAIN, "--steps=5") as job:
            assert job.wait() == 0, job.output()
        with Job(*common, *flags_for(foreign(tmp_path / "alien")), *TRAIN) as job:
            assert job.wait() == 2
            assert "has a certificate that we do not accept" in job.output()
