"""Runs the parts one after the other, tells how it goes, writes what was found."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

import msgspec
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from autoglm_elastic.bench import machine
from autoglm_elastic.bench.checkpoint import ranks, report, spec
from autoglm_elastic.bench.checkpoint.contenders import SAVERS
from autoglm_elastic.bench.checkpoint.spec import Options, Rows, Spec
from autoglm_elastic.errors import PlatformError, UsageError

DIR: Final = Path("runs/bench-checkpoint")
SPACE_STATES: Final = 24
"""So many times the state may lie on the disk at once: every contender's in a round, and ours of all rounds."""
MEMORY_QUICK: Final = ("ours", "dcp")
NO_DISK: Final = ("tmpfs", "ramfs")

Say = Callable[[str], None]


def main(
    folder: Path = DIR,
    only: list[str] | None = None,
    options: Options | None = None,
    *,
    allow_tmpfs: bool = False,
    json: Path | None = None,
    plots: Path | None = None,
    earlier: list[Path] | None = None,
) -> int:
    """Measure, print, and write `json` and the pictures.

    Args:
        folder: on the disk to be measured; a new folder is made in it and removed again.
        only: parts, or the beginnings of their names.
        options: sizes; the default is the full size.
        json: written after every part.
        plots: folder for the pictures; none are drawn without it.
        earlier: files of earlier runs whose parts are shown with this one's; with `only=[]` nothing is
            measured.

    Returns 0 whether targets are met or not. Raises UsageError, PlatformError.
    """
    options = options or Options()
    known = [report.read_json(path) for path in earlier or ()]
    parts = [] if earlier and not only else spec.chosen(only)
    measured: dict[str, Rows] = {}
    named = machine.describe()
    for one in known:
        measured.update(one.parts)
        named, options = one.machine, options if parts else one.options
    if parts:
        kind = _file_system(folder, allow_tmpfs=allow_tmpfs)
        named = machine.describe() | {"file system": kind}
        options = msgspec.structs.replace(options, disk=kind not in NO_DISK)
        with (
            _new_folder(folder, options) as mine,
            _progress(len(parts)) as (say, advance),
            _ended_by_sigterm(),
        ):
            for part in parts:
                say(f"{part}: {spec.PARTS[part]}")
                measured[part] = _measure(part, mine, options, say)
                if json is not None:
                    report.write_json(_results(named, options, measured), json)
                advance()
    results = _results(named, options, measured)
    if json is not None:
        report.write_json(results, json)
    if plots is not None:
        report.draw(results, plots)
    report.show(results, Console())
    return 0


def _results(named: dict[str, str], options: Options, measured: dict[str, Rows]) -> report.Results:
    """The parts in their order, whatever order they were measured in."""
    ordered = {part: measured[part] for part in spec.PARTS if part in measured}
    return report.Results(named, options, ordered)


def _measure(part: str, folder: Path, options: Options, say: Say) -> Rows:
    share = folder / f"{part}-share"
    share.mkdir()

    def start(role: str, world_size: int) -> Rows:
        own = folder / f"{part}-{role}"
        mark = uuid.uuid4().hex
        one = Spec(
            part=part,
            role=role,
            folder=str(own),
            share=str(share),
            world_size=world_size,
            mark=mark,
            options=options,
        )
        try:
            return ranks.run(one, lambda line: say(f"{part}: {line}"))
        finally:
            shutil.rmtree(own, ignore_errors=True)

    try:
        if part in {"limits", "planning"}:
            return start("measure", 1)
        if part.startswith("memory-"):
            rows: Rows = {}
            for name in MEMORY_QUICK if options.quick else SAVERS:
                rows |= start(name, 2)
            return rows
        if part.startswith("load-"):
            case = part.removeprefix("load-")
            before, after = (2, 2) if case == "replicated" else map(int, case.split("-"))
            start("prepare", before)
            return start("measure", after)
        return start("measure", 2)
    finally:
        shutil.rmtree(share, ignore_errors=True)


def _file_system(folder: Path, *, allow_tmpfs: bool) -> str:
    """Its type. Raises UsageError for one that is no disk."""
    place = folder.resolve()
    mounts = [disk for disk in psutil.disk_partitions(all=True) if place.is_relative_to(disk.mountpoint)]
    if not mounts:
        return "unknown"
    kind = max(mounts, key=lambda disk: len(disk.mountpoint)).fstype
    if kind in NO_DISK and not allow_tmpfs:
        raise UsageError(
            f"{folder} is {kind}, memory and no disk", do="name another with --dir, or --allow-tmpfs"
        )
    return kind


@contextlib.contextmanager
def _new_folder(parent: Path, options: Options) -> Iterator[Path]:
    made = not parent.exists()
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlatformError(
            f"could not make {parent}: {error.strerror}", do="name another with --dir"
        ) from error
    wanted, free = SPACE_STATES * options.mib << 20, shutil.disk_usage(parent).free
    if free < wanted:
        raise PlatformError(
            f"{parent} has {free >> 20} MiB free", valid=f"{wanted >> 20} MiB", do="name another with --dir"
        )
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: everything is cleaned up."""

    def end(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Say, Callable[[], None]]]:
    """(say a line, one more is done): a bar on a terminal, plain lines elsewhere; on stderr."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("parts", total=total)
        yield (
            lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
            lambda: progress.advance(task),
        )
