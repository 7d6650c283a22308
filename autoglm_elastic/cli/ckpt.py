"""`autoglm ckpt`: the snapshots of a run. Thin: finds the run directory, calls the room that knows, prints.

Works on a live run: nothing here takes a lock, except what changes where the next start resumes from. Must never:
import torch before a command that needs it. What `--json` prints is documented in docs/ckpt.md and stable."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from autoglm_elastic import settings
from autoglm_elastic.catalog import housekeeping, limits, rollback, tags
from autoglm_elastic.catalog.collect import Collector
from autoglm_elastic.catalog.diff import diff
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.inventory import Inventory
from autoglm_elastic.catalog.verify import verify
from autoglm_elastic.cli import _ckpt_text as text
from autoglm_elastic.cli import _place as place
from autoglm_elastic.coordination.clock import SystemClock
from autoglm_elastic.errors import CorruptSnapshot, ExitCode
from autoglm_elastic.observe.text import count

app = typer.Typer(help="Snapshots of a run: list, check, compare, name, keep, convert.")

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)]
Entry = Annotated[
    str, typer.Argument(metavar="ENTRY", help="HEAD, latest, a step, a tag or a name.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text (docs/ckpt.md).")]


@app.command("ls")
def ls(run: Run, as_json: AsJson = False) -> None:
    """The committed snapshots, oldest first."""
    found = _inventory(run)
    rows = found.rows()
    for name, reason in found.damaged.items():
        print(f"autoglm: {name} does not count: {reason}", file=sys.stderr)
    if as_json:
        _json(rows)
    elif rows:
        text.listing(rows)
    else:
        print("no snapshots")


@app.command("show")
def show(
    run: Run,
    entry: Entry = "HEAD",
    every: Annotated[bool, typer.Option("--all-tensors", help="All of them, not the first 40.")] = False,
    as_json: AsJson = False,
) -> None:
    """Everything about one snapshot but its values."""
    found = _inventory(run)
    told = found.detail(found.find(entry))
    _json(told) if as_json else text.detail(told, every)


class _Verified(msgspec.Struct, kw_only=True):
    name: str
    ok: bool
    problems: list[dict[str, str]]


@app.command("verify")
def verify_(
    run: Run,
    entries: Annotated[
        list[str] | None, typer.Argument(metavar="[ENTRY]...", help="Which ones; default: all.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All, also those outside of the lineage.")] = False,
    as_json: AsJson = False,
) -> int:
    """Read every byte and check it. Exit code 1 when something does not verify."""
    blobs = place.opened(run)
    catalog = Catalog(blobs)
    found = Inventory(blobs, catalog)
    wanted = [found.find(name) for name in entries or ()]
    told = []
    if every or not wanted:
        wanted = list(found.entries.values())
        told = [
            _verified(name, [{"file": "", "tensor": "", "reason": why}])
            for name, why in found.damaged.items()
        ]
    with text.progress("verifying", sum(entry.nbytes for entry in wanted), quiet=as_json) as advance:
        for entry in wanted:
            problems = verify(blobs, catalog, entry, on_bytes=advance)
            rows = [{"file": one.file, "tensor": one.tensor, "reason": one.reason} for one in problems]
            told.append(_verified(entry.name, rows))
            if not as_json:
                print(f"{entry.name}: {count(len(rows), 'problem') if rows else 'every byte verifies'}")
                for one in problems:
                    print(f"  {one}")
    if as_json:
        _json(told)
    else:
        for name, reason in found.damaged.items() if every or not entries else ():
            print(f"{name}: 1 problem\n  {reason}")
        if not told:
            print("no snapshots")
    return ExitCode.DONE if all(one.ok for one in told) else ExitCode.FAILED


def _verified(name: str, problems: list[dict[str, str]]) -> _Verified:
    return _Verified(name=name, ok=not problems, problems=problems)


@app.command("diff")
def diff_(
    run: Run,
    before: Annotated[str, typer.Argument(metavar="A", help="The older one.", show_default=False)],
    after: Annotated[str, typer.Argument(metavar="B", help="The newer one.", show_default=False)],
    values: Annotated[
        bool, typer.Option("--values", help="Read what differs, and tell how far it lies apart.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What differs between two snapshots, by the digests of their chunks."""
    blobs = place.opened(run)
    catalog = Catalog(blobs)
    found = Inventory(blobs, catalog)
    one, other = found.find(before), found.find(after)
    manifests = catalog.manifest(one), catalog.manifest(other)
    told = diff(blobs, (one.name, other.name), *manifests)
    if values:
        from autoglm_elastic.convert import compare_values

        with text.progress("comparing", one.nbytes + other.nbytes, quiet=as_json) as advance:
            told = compare_values(blobs, told, *manifests, on_bytes=advance)
    _json(told) if as_json else text.difference(told)


class _Tagged(msgspec.Struct, kw_only=True):
    tag: str
    entry: str | None
    before: str | None


@app.command("tag")
def tag(
    run: Run,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tag.", show_default=False)],
    entry: Entry,
    as_json: AsJson = False,
) -> None:
    """Give a snapshot a name, or move the name there. What has a tag is never collected."""
    blobs = place.opened(run)
    catalog = Catalog(blobs)
    chosen = Inventory(blobs, catalog).find(entry)
    before = tags.Tags(blobs).put(name, chosen.name, catalog, SystemClock().wall)
    if as_json:
        _json(_Tagged(tag=name, entry=chosen.name, before=before))
    else:
        print(f"{name} is {chosen.name}{f', was {before}' if before not in (None, chosen.name) else ''}")


@app.command("untag")
def untag(
    run: Run,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tag.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Take a tag away; the snapshot stays until the retention gives it up."""
    before = tags.Tags(place.opened(run)).remove(name)
    if as_json:
        _json(_Tagged(tag=name, entry=None, before=before))
    else:
        print(f"{name} was {before}")


class _RolledBack(msgspec.Struct, kw_only=True):
    entry: str
    generation: int
    before: str | None


@app.command("rollback")
def rollback_(
    run: Run,
    entry: Entry,
    force: Annotated[
        bool, typer.Option("--force", help="Although something holds the directory's lock.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Let the next start resume from an older snapshot. Nothing is deleted; back to a newer one undoes it."""
    from autoglm_elastic.observe.events import EventLog, SnapshotRolledBack

    blobs = place.opened(run)
    with place.claimed(run, force=force):
        catalog = Catalog(blobs)
        found = Inventory(blobs, catalog)
        chosen = found.find(entry)
        problems = verify(blobs, catalog, chosen)
        if problems:
            raise CorruptSnapshot(f"{chosen.name} does not verify: {problems[0]}", do="choose another one")
        before = found.head
        record = rollback.roll_back(catalog, chosen.name)
        path = place.event_log(run)
        if path is not None:
            log = EventLog(path, source="autoglm")
            log.emit(
                SnapshotRolledBack(
                    entry=chosen.name,
                    step=chosen.step,
                    generation=record.number,
                    head_before=before or "",
                )
            )
            log.close()
    if as_json:
        _json(_RolledBack(entry=chosen.name, generation=record.number, before=before))
        return
    print(f"the next start resumes from {chosen.name} (HEAD was {before}); newer snapshots are kept")
    if before is not None:
        print(f"undo: autoglm ckpt rollback {run} {before}")


class _Gc(msgspec.Struct, kw_only=True):
    dry_run: bool
    kept: dict[str, str]
    retired: list[str]
    restored: list[str]
    waiting: list[str]
    packs: int
    manifests: int
    nbytes: int
    leftovers: int
    blocked: str
    more: bool


@app.command("gc")
def gc(
    run: Run,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of settings, for snapshot.keep_*.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="GROUP.FIELD=VALUE", help="One setting; repeatable.")
    ] = None,
    now: Annotated[
        bool,
        typer.Option("--now", help="Do not wait for readers of what is given up; refused while a job runs."),
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Remove what the retention gives up and what nothing reaches. Exit code 1 when damage stands in the way."""
    loaded = settings.load(config, os.environ, [settings.override(given) for given in overrides or ()])
    keep = loaded.settings.snapshot
    blobs = housekeeping.aging(place.opened(run))
    with place.claimed(run, force=False) if now else contextlib.nullcontext():
        collector = Collector(
            blobs,
            keep.retention(),
            grace_s=0.0 if now else keep.gc_grace_s,
            age_s=limits.PREPARE_S_MAX if now else keep.gc_grace_s,
            wall=SystemClock().wall,
        )
        done = collector.run(dry_run=dry_run)
    if as_json:
        _json(_Gc(dry_run=dry_run, **dataclasses.asdict(done)))
    else:
        text.collected(done, dry_run)
    return ExitCode.FAILED if done.blocked else ExitCode.DONE


def _inventory(run: str) -> Inventory:
    blobs = place.opened(run)
    return Inventory(blobs, Catalog(blobs))


def _json(told: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(told), indent=2).decode())
