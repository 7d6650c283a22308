"""The command line of `autoglm-run`: torch's own parser, a few flags of ours, and what they mean together.

May touch: the command line, the environment, the configuration file. Must never: start or create anything,
or list torch's flags: only those are named that a decision depends on, so a new torch flag works unchanged.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn
from urllib.parse import quote

from torch.distributed import run as torchrun
from torch.distributed.argparse_util import check_env, env
from torch.distributed.elastic.utils.api import macros

from autoglm_elastic import settings
from autoglm_elastic.coordination import etcd
from autoglm_elastic.errors import UsageError

BACKEND: Final = "autoglm"
ETCD_BACKEND: Final = "autoglm-etcd"
LOCAL_ENDPOINT: Final = "localhost:0"
"""A store of this job's own, on a free port."""

RUN_ID_UNSET: Final = "none"
"""torch's default for `--rdzv-id`, which cannot be told from a user's own."""

RUN_ID_BYTES_MAX: Final = 200
"""Quoted, as it stands in keys. A file's name has room for 255 with what torch adds."""

_OUR_FLAGS: Final = "autoglm"


@dataclass(frozen=True, slots=True)
class Command:
    """One checked command line. `args` is torch's namespace, with the rendezvous settled."""

    args: argparse.Namespace
    loaded: settings.Loaded
    run_id_given: str | None
    argv: tuple[str, ...]

    @property
    def is_ours(self) -> bool:
        """Whether the job meets through our own rendezvous."""
        return bool(self.args.rdzv_backend == BACKEND)

    @property
    def is_alone(self) -> bool:
        """Whether this launcher hosts a store of its own, which nobody else is told about."""
        return self.is_ours and bool(self.args.rdzv_endpoint == LOCAL_ENDPOINT)


def parser() -> argparse.ArgumentParser:
    """torch's parser with our flags; every error is a `UsageError` of one line."""
    try:
        result = torchrun.get_args_parser()
    except ValueError as error:
        raise UsageError(f"PET_* environment: {error}", valid="0 or 1 for a flag without a value") from error
    result.prog = "autoglm-run"
    result.description = "Fault-tolerant torchrun: every torchrun flag, and those of the group 'autoglm'."
    result.error = _Refusal(result)  # type: ignore[method-assign]
    ours = result.add_argument_group(_OUR_FLAGS)
    ours.add_argument(
        "--run-dir",
        "--run_dir",
        action=env,
        default=None,
        help="Directory of everything that must last: snapshots, events, logs. An existing one is resumed.",
    )
    ours.add_argument("--config", action=env, default=None, help="YAML file of settings.")
    ours.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="GROUP.FIELD=VALUE",
        help="One setting; repeatable; wins over file and environment.",
    )
    ours.add_argument(
        "--store",
        action=env,
        default=None,
        help="Store as tcp://host:port, hosted by the agent there (short for --rdzv-backend=autoglm "
        "--rdzv-endpoint=host:port), or as etcd://host:port,host:port… (docs/etcd.md).",
    )
    ours.add_argument(
        "--preload",
        action=env,
        default=None,
        help="Comma-separated modules to import once, before workers are forked.",
    )
    ours.add_argument(
        "--fresh",
        action=check_env,
        help="Begin from nothing in a run directory that has been used; needs --destroy.",
    )
    ours.add_argument(
        "--destroy",
        type=int,
        default=None,
        metavar="SNAPSHOTS",
        help="Agree that --fresh destroys so many snapshots; the number must be right.",
    )
    ours.add_argument(
        "--print-config",
        "--print_config",
        action=check_env,
        help="Print every setting and flag with where it came from, and exit.",
    )
    return result


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Command:
    """The command line, complete and checked as far as it can be without starting anything.

    Raises:
        UsageError: whatever is wrong with it, in one line.
    """
    flags = parser()
    args = _parse_args(flags, argv)
    overrides = [settings.override(text) for text in args.set]
    if args.preload is not None:
        source = _source_of("preload", _on_command_line(argv), environ)
        overrides.append(("zygote.preload", args.preload, source))
    loaded = settings.load(args.config, environ, overrides)
    run_id_given = None if args.standalone or args.rdzv_id == RUN_ID_UNSET else str(args.rdzv_id)
    if not args.print_config:
        _check_script(args, environ)
    _check_run_id(args)
    _check_fresh(args)
    _check_variables(args, environ)
    _settle_rendezvous(args)
    return Command(args, loaded, run_id_given, tuple(argv))


def explain_flags(argv: Sequence[str], environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(flag, value, source) of every launcher flag, as given and before the rendezvous is settled."""
    flags = parser()
    args = _parse_args(flags, argv)
    given = _on_command_line(argv)
    for action in _optional(flags):
        yield (
            max(action.option_strings, key=len).replace("_", "-"),
            str(getattr(args, action.dest)),
            _source_of(action.dest, given, environ),
        )


def _parse_args(flags: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    # --print-config needs no script, but torch's parser does: give it one, unless the flag is the script's.
    if any(argument.replace("_", "-") == "--print-config" for argument in argv):
        args = flags.parse_args([*argv, ""])
        if getattr(args, "print_config", False):
            return args
    return flags.parse_args(list(argv))


def _optional(flags: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in flags._actions if action.option_strings and action.dest != "help"]


def _on_command_line(argv: Sequence[str]) -> frozenset[str]:
    """The flags that were given there, whatever their value."""
    flags = parser()
    for action in flags._actions:
        action.default = argparse.SUPPRESS
    return frozenset(vars(_parse_args(flags, argv)))


def _source_of(dest: str, given: frozenset[str], environ: Mapping[str, str]) -> str:
    if dest in given:
        return f"flag --{dest.replace('_', '-')}"
    variable = f"PET_{dest.upper()}"
    return f"environment {variable}" if variable in environ else "default"


class _Refusal:
    """argparse's `error`, raising instead of printing the usage and leaving."""

    def __init__(self, flags: argparse.ArgumentParser) -> None:
        self._flags = flags

    def __call__(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown == message:
            raise UsageError(message, do="autoglm-run --help lists the flags")
        name = unknown.split()[0].partition("=")[0]
        known = [option for action in _optional(self._flags) for option in action.option_strings]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"unknown flag {name}", do=f"{hint}autoglm-run --help lists the flags")


def _check_script(args: argparse.Namespace, environ: Mapping[str, str]) -> None:
    script = str(args.training_script)
    if macros.local_rank in script or "PYTHON_EXEC" in environ:
        return  # another file for each worker, or an interpreter that may see other files
    if args.no_python and not args.run_path:
        if shutil.which(script) is None:
            raise UsageError(f"no program {script}", valid="an executable file, or a command on PATH")
    elif not args.module and not os.path.exists(script):
        raise UsageError(f"can't open script {script}: no such file (in {os.getcwd()})")


def _check_run_id(args: argparse.Namespace) -> None:
    run_id = str(args.rdzv_id)
    if "/" in run_id or not run_id.isprintable() or len(quote(run_id)) > RUN_ID_BYTES_MAX:
        shown = run_id if len(run_id) <= RUN_ID_BYTES_MAX else f"{run_id[:40]}… of {len(run_id)} characters"
        raise UsageError(
            f"--rdzv-id {shown}",
            valid=f"at most {RUN_ID_BYTES_MAX} letters, digits and the like, without a slash: it names files",
        )


def _check_fresh(args: argparse.Namespace) -> None:
    if args.fresh and args.run_dir is None:
        raise UsageError("--fresh without a run directory", do="give --run-dir too")
    if args.destroy is not None and not args.fresh:
        raise UsageError("--destroy without --fresh", do="give both, or neither")


def _check_variables(args: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Nobody shall believe that a job has what a variable says which only launch/ reads, or nobody."""
    meets = args.store or args.standalone or args.rdzv_endpoint or args.rdzv_backend != "static"
    for name, has_it in (("CONFIG", args.config is not None), ("STORE", meets)):
        if f"AUTOGLM_{name}" in environ and not has_it:
            raise UsageError(
                f"AUTOGLM_{name} is set, which autoglm-run does not read",
                do=f"give --{name.lower()} or set PET_{name}, or unset AUTOGLM_{name}",
            )


def _settle_rendezvous(args: argparse.Namespace) -> None:
    """Where torch's `run()` falls back to its c10d backend on a free port, use ours; else change nothing."""
    nodes_max = nodes(args)[1]
    unspecified = args.rdzv_backend == "static" and not args.rdzv_endpoint and args.master_port is None
    if args.rdzv_backend == ETCD_BACKEND and args.store is None:
        args.store, args.rdzv_endpoint = f"{etcd.SCHEME}://{args.rdzv_endpoint}", ""
    if args.store is not None:
        _apply_store(args)
    elif args.standalone:
        args.rdzv_id = RUN_ID_UNSET
        args.rdzv_backend, args.rdzv_endpoint = BACKEND, LOCAL_ENDPOINT
    elif unspecified and nodes_max == 1:
        args.rdzv_backend, args.rdzv_endpoint = BACKEND, LOCAL_ENDPOINT
    elif args.rdzv_backend == BACKEND and not args.rdzv_endpoint:
        if nodes_max > 1:
            raise UsageError(
                "--rdzv-backend=autoglm for several nodes without an endpoint", do="give --store"
            )
        args.rdzv_endpoint = LOCAL_ENDPOINT
    if args.master_port is None:
        args.master_port = 29500  # as torch's run(): only its static rendezvous looks at it


def _apply_store(args: argparse.Namespace) -> None:
    scheme, separator, address = args.store.partition("://")
    if separator and scheme == etcd.SCHEME:
        address = _etcd_address(args)
    else:
        host, _, port = address.rpartition(":")
        if scheme != "tcp" or not host or not port.isdecimal() or int(port) > 65535:
            raise UsageError(
                f"--store {args.store}", valid=f"tcp://host:port, such as tcp://node0:29400, or {etcd.VALID}"
            )
    for name, value, default in (
        ("--standalone", args.standalone, False),
        ("--rdzv-endpoint", args.rdzv_endpoint, ""),
        ("--rdzv-backend", args.rdzv_backend, "static"),
    ):
        if value not in (default, BACKEND, ETCD_BACKEND):
            raise UsageError(f"--store together with {name}", do="give only one of them")
    args.rdzv_backend, args.rdzv_endpoint = BACKEND, address


def _etcd_address(args: argparse.Namespace) -> str:
    etcd.require()
    etcd.parse(args.store)
    if args.rdzv_id in (RUN_ID_UNSET, "") and not args.print_config:
        raise UsageError(
            "a store that other jobs use, and no name for this one",
            do="give --rdzv-id, the same to every agent of the job and to no other",
        )
    return str(args.store)


def nodes(args: argparse.Namespace) -> tuple[int, int]:
    """(minimum, maximum) of `--nnodes`."""
    try:
        low, high = torchrun.parse_min_max_nnodes(args.nnodes)
    except (ValueError, RuntimeError):
        low, high = 0, 0
    if not 0 < low <= high:
        raise UsageError(f"--nnodes {args.nnodes}", valid="a number, or minimum:maximum such as 1:3")
    return low, high
