"""The command line: torch's parser with our flags, and what is made of the rendezvous flags."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

from autoglm_elastic.agent import flags
from autoglm_elastic.errors import ExitCode, UsageError, in_one_line

SCRIPT = __file__


def parse(*argv: str, environ: dict[str, str] | None = None) -> flags.Command:
    return flags.parse([*argv, SCRIPT], environ or {})


def rendezvous(*argv: str) -> tuple[str, str]:
    args = parse(*argv).args
    return args.rdzv_backend, args.rdzv_endpoint


def test_every_torchrun_flag_is_there_with_its_default() -> None:
    ours, theirs = flags.parser(), torchrun.get_args_parser()
    for action in theirs._actions:
        if action.dest != "help":
            same = next(a for a in ours._actions if a.dest == action.dest)
            assert (same.option_strings, same.default) == (action.option_strings, action.default)


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--standalone",),
        ("--standalone", "--rdzv-backend=c10d", "--rdzv-endpoint=host:1"),
        ("--rdzv-backend=autoglm",),
        ("--nnodes=1", "--rdzv-backend=static"),
    ],
)
def test_a_single_node_meets_on_a_store_of_its_own(argv: tuple[str, ...]) -> None:
    assert rendezvous(*argv) == ("autoglm", "localhost:0")
    assert parse(*argv).is_alone


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--rdzv-backend=c10d", "--rdzv-endpoint=h:1"), ("c10d", "h:1")),
        (("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"), ("c10d", "localhost:0")),
        (("--rdzv-backend=etcd-v2", "--rdzv-endpoint=h:1"), ("etcd-v2", "h:1")),
        (("--master-port=29501",), ("static", "")),
        (("--nnodes=2", "--node-rank=1", "--master-addr=h"), ("static", "")),
        (("--rdzv-endpoint=h:1",), ("static", "h:1")),
        (("--nnodes=1:3", "--store=tcp://h:29400"), ("autoglm", "h:29400")),
        (("--rdzv-backend=autoglm", "--rdzv-endpoint=h:1"), ("autoglm", "h:1")),
    ],
)
def test_a_rendezvous_that_is_named_is_honoured(argv: tuple[str, ...], expected: tuple[str, str]) -> None:
    assert rendezvous(*argv) == expected
    assert not parse(*argv).is_alone


def test_the_run_id_is_the_users_when_given() -> None:
    assert parse("--rdzv-id=job7").run_id_given == "job7"
    assert parse("--rdzv-id=Jöb 7 ☃").run_id_given == "Jöb 7 ☃"
    assert parse().run_id_given is None
    assert parse("--standalone", "--rdzv-id=job7").run_id_given is None  # as torchrun: ignored


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--nproc-per-nodes=2",), "unknown flag --nproc-per-nodes; do: did you mean --nproc-per-node"),
        (("--bogus", "3"), "unknown flag --bogus"),
        (("--max-restarts=x",), "--max-restarts.*invalid int value: 'x'"),
        (("--nnodes=3:1",), "--nnodes 3:1; valid"),
        (("--nnodes=a",), "--nnodes a; valid"),
        (("--store=etcd://h:1",), "no name for this one; do: give --rdzv-id"),
        (("--store=etcd://h:1", "--rdzv-id="), "no name for this one; do: give --rdzv-id"),
        (("--rdzv-id=a/../b",), "--rdzv-id a/../b; valid: at most 200 .*without a slash"),
        (("--rdzv-id=a\nb",), "valid: at most 200"),
        (("--rdzv-id=" + 300 * "r",), "rrr… of 300 characters; valid: at most 200"),
        (("--rdzv-id=" + 40 * "ö",), "valid: at most 200"),
        (("--store=etcd://u:secret@h:1", "--rdzv-id=j"), "a password in the address of etcd"),
        (("--store=etcd://h:1,h:99999", "--rdzv-id=j"), "'h:99999' in .*valid: etcd://"),
        (("--store=etcd://h:1?cafile=x", "--rdzv-id=j"), "cafile=x in .*valid: etcd://"),
        (("--store=etcd://h:1?cert=x", "--rdzv-id=j"), "a certificate without its key"),
        (("--store=h:1",), "valid: tcp://host:port"),
        (("--store=tcp://h",), "valid: tcp://host:port"),
        (("--store=tcp://h:70000",), "valid: tcp://host:port"),
        (("--store=tcp://h:1", "--rdzv-backend=c10d"), "--store together with --rdzv-backend"),
        (("--store=tcp://h:1", "--rdzv-endpoint=h:1"), "--store together with --rdzv-endpoint"),
        (("--store=tcp://h:1", "--standalone"), "--store together with --standalone"),
        (("--nnodes=2", "--rdzv-backend=autoglm"), "several nodes without an endpoint; do: give --store"),
        (("--fresh",), "--fresh without a run directory"),
        (("--run-dir=r", "--destroy=3"), "--destroy without --fresh"),
        (("--set=lease=3",), "lease: no such setting"),
        (("--config=none.yaml",), "none.yaml: No such file"),
        (("none.py",), "can't open script none.py"),
        (("--no-python", "none-such"), "no program none-such"),
    ],
)
def test_a_bad_command_line_is_refused_in_one_line(argv: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse(*argv)
    assert "\n" not in in_one_line(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE


def test_our_flags_have_pet_variables_like_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"PET_RUN_DIR": "there", "PET_PRELOAD": "a,b", "PET_NPROC_PER_NODE": "3", "PET_STANDALONE": "1"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    command = parse(environ=environ)
    assert (command.args.run_dir, command.args.nproc_per_node) == ("there", "3")
    assert command.loaded.settings.zygote.preload == ("a", "b")
    assert command.loaded.provenance["zygote.preload"] == "environment PET_PRELOAD"
    monkeypatch.setenv("PET_STANDALONE", "yes")
    with pytest.raises(UsageError, match=r"PET_\* environment"):
        parse()


@pytest.mark.parametrize(
    ("variable", "flag"),
    [("AUTOGLM_CONFIG", "--config"), ("AUTOGLM_STORE", "--store")],
)
def test_a_variable_that_would_not_count_is_refused(variable: str, flag: str) -> None:
    with pytest.raises(UsageError, match=f"{variable} is set.*{flag} or set PET_"):
        parse(environ={variable: "x"})
    for meets in ("--store=tcp://localhost:1", "--standalone", "--rdzv-endpoint=h:1"):
        parse(meets, environ={"AUTOGLM_STORE": "x"})


def test_where_a_flag_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"PET_NPROC_PER_NODE": "2", "PET_NNODES": "1:1"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    argv = ["--nproc-per-node=2", "--max-restarts=0", SCRIPT]
    sources = {flag: source for flag, _, source in flags.explain_flags(argv, environ)}
    assert sources["--nproc-per-node"] == "flag --nproc-per-node"  # although the variable says the same
    assert sources["--max-restarts"] == "flag --max-restarts"  # although it is the default
    assert sources["--nnodes"] == "environment PET_NNODES"


def test_a_script_named_by_local_rank_is_not_looked_for() -> None:
    assert flags.parse(["train_${local_rank}.py"], {}).args.training_script == "train_${local_rank}.py"


def test_flags_of_the_script_are_the_scripts() -> None:
    args = flags.parse([SCRIPT, "--print-config", "--fresh", "--set", "x"], {}).args
    assert args.training_script_args == ["--print-config", "--fresh", "--set", "x"]
    assert not args.print_config


def test_print_config_starts_nothing_and_needs_no_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "autoglm_elastic.cli.run", "--nproc-per-node=2", "--run-dir", tmp_path / "run",
         "--set", "membership.lease_s=5", "--print-config"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "lease_s: 5.0 # flag --set membership.lease_s" in lines
    assert "# --nproc-per-node 2 # flag --nproc-per-node" in lines
    assert "# --max-restarts 0 # default" in lines
    assert not (tmp_path / "run").exists()
