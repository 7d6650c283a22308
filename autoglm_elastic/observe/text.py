"""A report as a few lines for people. Must never: compute anything that `report` does not hold."""

from __future__ import annotations

from autoglm_elastic.observe.events import PHASES
from autoglm_elastic.observe.report import Change, Incident, Report


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


def change(item: Change, started: float) -> str:
    world = f"{item.world_before or '?'} → {item.world_after or '?'} workers"
    steps = "steps" if item.from_step < 0 else f"after step {item.from_step}"
    if item.kind == "growth":
        return f"  at {duration(item.committed - started)}: grew, {world}, {steps}, nothing lost"
    return f"  at {duration(item.committed - started)}: resumed {steps}, {item.world_after or '?'} workers"


def lines(report: Report) -> list[str]:
    """The whole report."""
    loss = "" if report.loss is None else f", loss {report.loss:.4f}"
    out = [
        f"run {report.run_id or '?'}: {report.status}{f' ({report.reason})' if report.reason else ''},"
        f" step {report.step}{loss}, {duration(report.wall_s)}"
    ]
    if report.goodput is not None:
        startup = f", starting up took {duration(report.startup_s)}" if report.startup_s is not None else ""
        out.append(
            f"goodput {report.goodput:.1%}: {duration(report.committed_s)} in"
            f" {count(report.steps_committed, 'committed step')} of {duration(report.wall_s)}{startup};"
            f" {count(report.steps_redone, 'step')} redone"
        )
    out.append(f"{count(len(report.incidents), 'incident')}")
    for number, item in enumerate(report.incidents, start=1):
        out += incident(item, number, report.started)
    changes = [item for item in report.changes if item.kind != "start"]
    if changes:
        out.append(f"{count(len(changes), 'change')} without a fault")
        out += [change(item, report.started) for item in changes]
    committed = [note for note in report.snapshots if note.outcome == "committed"]
    snapshots = count(len(committed), "snapshot") + " committed"
    if committed:
        seconds = sorted(note.seconds for note in committed)[len(committed) // 2]
        newest = committed[-1]
        snapshots += f", newest at step {newest.step} ({size(newest.nbytes)}), median {duration(seconds)}"
    out.append(snapshots)
    out += [
        f"  {note.outcome}: {note.entry or f'step {note.step}'}: {shortened(note.reason)}"
        for note in report.snapshots
        if note.outcome != "committed"
    ]
    return out
