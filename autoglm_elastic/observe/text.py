"""A report as a few lines for people. Must never: compute anything that `report` does not hold."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from autoglm_elastic.observe.events import PHASES
from autoglm_elastic.observe.report import Change, Incident, Report

INCIDENTS_SHOWN: Final = 10
"""Of more than these, what they have in common is told, and only the slowest and the newest one by one."""

FEW: Final = 3


def duration(seconds: float | None) -> str:
    """Three digits and a unit: 48 ms, 1.62 s, 12.4 min."""
    if seconds is None:
        return "unknown"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.3g} s" if seconds >= 10 else f"{seconds:.2f} s"
    return f"{seconds / 60:.1f} min"


def size(nbytes: float) -> str:
    """Binary units: 7.7 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def newest_step(step: int) -> str:
    """The newest committed step; -1: there is none."""
    return f"step {step}" if step >= 0 else "no committed step"


def shortened(text: str, chars_max: int = 100) -> str:
    """At most so many characters; what is cut off is marked."""
    return text if len(text) <= chars_max else text[: chars_max - 1].rstrip() + "…"


def phases(phases_s: dict[str, float]) -> str:
    """ "detect 3 ms · unwind 21 ms · …" in the order of a recovery, unknown names last."""
    names: list[str] = [name for name in PHASES if name in phases_s]
    names += [name for name in phases_s if name not in PHASES]
    return " · ".join(f"{name.replace('_', ' ')} {duration(phases_s[name])}" for name in names)


def incident(item: Incident, number: int, started: float) -> list[str]:
    """One incident: what, how long, what it cost; then its phases."""
    what = f"  {number}. at {duration(item.opened - started)}: {item.reason}"
    if item.closed is None and item.restarted is not None:
        started_again = duration(item.restarted - item.opened)
        return [what, f"     seen → all workers started again {started_again}; no step was committed"]
    if item.closed is None:
        return [what, "     not recovered from"]
    lost = "steps lost unknown" if item.steps_lost is None else f"{count(item.steps_lost, 'step')} lost"
    world = f"{item.world_before or '?'} → {item.world_after or '?'} workers"
    since = "fault" if item.fault is not None else "seen"
    lines = [
        what,
        f"     {since} → next new step {duration(item.seconds)}, {lost} (state: {item.tier}, from step"
        f" {item.from_step}), {world}",
    ]
    if item.phases_s:
        lines.append(f"     {phases(item.phases_s)}")
    return lines


def incidents(report: Report, *, each: bool) -> list[str]:
    """All of them one by one when there are few, or when `each`."""
    numbered = list(enumerate(report.incidents, start=1))
    out = [count(len(numbered), "incident")]
    if not each and len(numbered) > INCIDENTS_SHOWN:
        out += _in_common(report.incidents)
        slow = sorted(numbered, key=lambda pair: pair[1].seconds or 0.0)[-FEW:]
        shown = {number for number, item in [*slow, *numbered[-FEW:]]}
        shown |= {number for number, item in numbered if item.steps_lost or item.closed is None}
        if len(shown) > INCIDENTS_SHOWN:
            shown = set(sorted(shown)[-INCIDENTS_SHOWN:])
        numbered = [(number, item) for number, item in numbered if number in shown]
        out.append(f"the slowest, the newest and those that cost steps ({len(numbered)}; --all shows each):")
    for number, item in numbered:
        out += incident(item, number, report.started)
    return out


def _in_common(items: Sequence[Incident]) -> list[str]:
    """A line for each kind of outcome, and the median phases."""
    kinds: dict[str, list[Incident]] = {}
    for item in items:
        kinds.setdefault(_kind(item), []).append(item)
    out = []
    for kind, group in kinds.items():
        seconds = [item.seconds for item in group if item.seconds is not None]
        lost = sum(item.steps_lost or 0 for item in group)
        took = (
            f": median {duration(statistics.median(seconds))}, worst {duration(max(seconds))}, "
            f"{count(lost, 'step')} lost"
            if seconds
            else ""
        )
        out.append(f"  {len(group)}x {kind}{took}")
    names = {name for item in items for name in item.phases_s}
    medians = {
        name: statistics.median([item.phases_s[name] for item in items if name in item.phases_s])
        for name in names
    }
    return [*out, f"  median phases: {phases(medians)}"] if medians else out


def _kind(item: Incident) -> str:
    if item.closed is None:
        return "not recovered from" if item.restarted is None else "all workers started again"
    before, after = item.world_before, item.world_after
    if before is None or after is None:
        world = "world not known"
    elif after < before:
        world = "went on with fewer workers"
    else:
        world = "went on with as many workers" if after == before else "went on with more workers"
    return f"{world}, state {item.tier}"


def change(item: Change, started: float) -> str:
    world = f"{item.world_before or '?'} → {item.world_after or '?'} workers"
    steps = "steps" if item.from_step < 0 else f"after step {item.from_step}"
    if item.kind == "growth":
        return f"  at {duration(item.committed - started)}: grew, {world}, {steps}, nothing lost"
    return f"  at {duration(item.committed - started)}: resumed {steps}, {item.world_after or '?'} workers"


def lines(report: Report, *, each: bool = False) -> list[str]:
    """The whole report. `each`: every incident by itself, however many there are."""
    loss = "" if report.loss is None else f", loss {report.loss:.4f}"
    out = [
        f"run {report.run_id or '?'}: {report.status}{f' ({report.reason})' if report.reason else ''},"
        f" {newest_step(report.step)}{loss}, {duration(report.wall_s)}"
    ]
    if report.goodput is not None:
        startup = f", starting up took {duration(report.startup_s)}" if report.startup_s is not None else ""
        out.append(
            f"goodput {report.goodput:.1%}: {duration(report.committed_s)} in"
            f" {count(report.steps_committed, 'committed step')} of {duration(report.wall_s)}{startup};"
            f" {count(report.steps_redone, 'step')} redone"
        )
    out += incidents(report, each=each)
    changes = [item for item in report.changes if item.kind != "start"]
    if changes:
        out.append(f"{count(len(changes), 'change')} without a fault")
        shown = changes if each else changes[-INCIDENTS_SHOWN:]
        out += [change(item, report.started) for item in shown]
        if len(shown) < len(changes):
            out.append(f"  (the newest {len(shown)})")
    committed = [note for note in report.snapshots if note.outcome == "committed"]
    snapshots = count(len(committed), "snapshot") + " committed"
    if committed:
        seconds = sorted(note.seconds for note in committed)[len(committed) // 2]
        newest = committed[-1]
        snapshots += f", newest at step {newest.step} ({size(newest.nbytes)}), median {duration(seconds)}"
    out.append(snapshots)
    vain = [note for note in report.snapshots if note.outcome != "committed"]
    if not each and len(vain) > INCIDENTS_SHOWN:
        out.append(f"  {len(vain)} others, the newest {INCIDENTS_SHOWN}:")
        vain = vain[-INCIDENTS_SHOWN:]
    out += [
        f"  {note.outcome}: {note.entry or f'step {note.step}'}: {shortened(note.reason)}" for note in vain
    ]
    return out
