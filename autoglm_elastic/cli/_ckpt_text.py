"""Snapshots as tables and lines for people: a table on a terminal, plain lines elsewhere.

Must never: compute anything about snapshots."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import msgspec

from autoglm_elastic.catalog import tree
from autoglm_elastic.catalog.collect import Collected
from autoglm_elastic.catalog.diff import Difference, TensorChange
from autoglm_elastic.catalog.inventory import Detail, Row
from autoglm_elastic.observe.text import count, shortened, size

_LEAVES_MAX = 40
_VALUE_CHARS_MAX = 60


def when(wall_time: float) -> str:
    return datetime.fromtimestamp(wall_time).strftime("%Y-%m-%d %H:%M:%S")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """On a terminal a table, else columns two spaces apart without a header."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        shown = Table(box=None, pad_edge=False, header_style="bold")
        for number, column in enumerate(columns):
            shown.add_column(column, justify="right" if number in right else "left", overflow="fold")
        for row in rows:
            shown.add_row(*row)
        Console(highlight=False, markup=False).print(shown)
        return
    widths = [max((len(row[number]) for row in rows), default=0) for number in range(len(columns))]
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def listing(rows: Sequence[Row]) -> None:
    table(
        ("name", "step", "gen", "time", "kind", "bytes", "tensors", "world", "", "tags", "metrics"),
        [
            (
                row.name,
                str(row.step),
                f"g{row.generation}",
                when(row.wall_time),
                row.kind,
                size(row.nbytes),
                count(row.tensors, "tensor"),
                count(row.world_size, "rank"),
                "HEAD" if row.head else "" if row.in_lineage else "fenced",
                ",".join(row.tags),
                " ".join(f"{key}={number:.6g}" for key, number in row.metrics.items()),
            )
            for row in rows
        ],
        right=(1, 5, 6, 7),
    )


def detail(told: Detail, every_tensor: bool) -> None:
    row = told.snapshot
    place = "HEAD" if row.head else "in the lineage" if row.in_lineage else "outside of the lineage (fenced)"
    facts = [
        ("snapshot", f"{row.name} ({row.kind}), {place}"),
        ("written", f"{when(row.wall_time)} by {count(row.world_size, 'rank')}"),
        ("parent", row.parent or "none"),
        ("tags", ", ".join(row.tags) or "none"),
        ("metrics", " ".join(f"{key}={number:.6g}" for key, number in row.metrics.items()) or "none"),
        ("config", told.config_digest or "no digest"),
        ("environment", " ".join(f"{key} {text}" for key, text in told.environment.items()) or "unknown"),
        ("manifest", f"{told.manifest} ({size(told.manifest_bytes)})"),
        ("size", f"{size(row.nbytes)} in {count(len(told.packs), 'pack')}"),
    ]
    for name, text in facts:
        print(f"{name:<12} {text}")
    for pack in told.packs:
        chunks = "damaged header" if pack.chunks is None else count(pack.chunks, "chunk")
        print(f"  {pack.file}  {size(pack.nbytes)}  rank {pack.rank}  {chunks}")
    print(f"{'tensors':<12} {len(told.tensors)}")
    shown = told.tensors if every_tensor else told.tensors[:_LEAVES_MAX]
    for tensor in shown:
        print(f"  {tensor.name}  {tensor.dtype}  {list(tensor.shape)}  {size(tensor.nbytes)}")
    if len(shown) < len(told.tensors):
        print(f"  and {len(told.tensors) - len(shown)} more (--all-tensors)")
    values = list(_values(told.tree))
    print(f"{'values':<12} {len(values)}")
    for path, value in values if every_tensor else values[:_LEAVES_MAX]:
        print(f"  {path}: {_short(value)}")
    if not every_tensor and len(values) > _LEAVES_MAX:
        print(f"  and {len(values) - _LEAVES_MAX} more (--all-tensors)")


def _values(node: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in tree.leaves(node):
        if tree.code_of(leaf) not in ("tensor", "array"):
            yield tree.path_name(path), leaf


def _short(value: Any) -> str:
    return shortened(msgspec.json.encode(value).decode(), _VALUE_CHARS_MAX)


def difference(told: Difference) -> None:
    for change in told.tensors:
        print(f"{_MARKS[change.what]} {change.name}  {_change(change)}")
    for value in told.values:
        mark = {"added": "+", "removed": "-", "changed": "~"}[value.what]
        parts = [_short(value.before)] if value.what != "added" else []
        parts += [_short(value.after)] if value.what != "removed" else []
        print(f"{mark} {value.path}: {' → '.join(parts)}")
    print(
        f"{told.before} → {told.after}: {count(len(told.tensors), 'tensor')} and {count(len(told.values), 'value')}"
        f" differ, {count(told.same, 'tensor')} the same"
    )


_MARKS = {"added": "+", "removed": "-", "dtype": "~", "shape": "~", "bytes": "~", "unknown": "?"}


def _change(change: TensorChange) -> str:
    match change.what:
        case "added":
            return change.after
        case "removed":
            return change.before
        case "dtype" | "shape":
            return f"{change.before} → {change.after}"
        case "unknown":
            text = f"{change.after}, cut into other chunks (--values compares them)"
        case _:
            text = f"{change.after}, {size(change.bytes_changed)} differ"
    if change.elements_changed is None:
        return text
    largest = "" if change.max_abs is None else f", largest difference {change.max_abs:.6g}"
    return f"{change.after}, {count(change.elements_changed, 'element')} differ{largest}"


def collected(done: Collected, dry_run: bool) -> None:
    would = "would be " if dry_run else ""
    for name in done.retired:
        print(f"{name}: {would}given up")
    for name in done.restored:
        print(f"{name}: {would}brought back, something names it again")
    for name, why in done.kept.items():
        print(f"{name}: kept, {why}")
    removed = [count(done.packs, "pack"), count(done.manifests, "manifest")]
    print(
        f"{' and '.join(removed)} {would}removed, {size(done.nbytes)}; {count(done.leftovers, 'leftover')} swept"
    )
    if done.waiting:
        print(f"{count(len(done.waiting), 'snapshot')} given up, removed when the grace is over")
    if done.more:
        print("there is more to do: run it again")
    if done.blocked:
        print(f"no packs were removed, since nobody knows what is needed: {done.blocked}")


@contextmanager
def progress(what: str, total_nbytes: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error while bytes are worked on, if that is a terminal. Yields what to tell each advance."""
    if quiet or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total_nbytes)
        yield lambda nbytes: bar.advance(task, nbytes)
