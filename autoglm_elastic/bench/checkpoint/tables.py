"""The tables, and with each the bars of its picture."""

from __future__ import annotations

from dataclasses import dataclass, field

from autoglm_elastic.bench.checkpoint.contenders import LOADERS, SAVERS, SMALL_SAVERS
from autoglm_elastic.bench.checkpoint.figures import (
    Parts,
    above_none,
    best_of,
    median,
    planning_s,
    planning_worlds,
    worst,
)
from autoglm_elastic.bench.checkpoint.spec import LOAD_CASES, Rows

NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars of one measure; the unit is in the title."""

    title: str
    bars: list[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Table:
    """`name` is the picture's, too: `checkpoint_NAME.png`."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    panels: list[Panel] = field(default_factory=list)


def seconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    return (
        f"{value:.2f} s"
        if abs(value) >= 1
        else f"{value * 1000:.0f} ms"
        if abs(value) >= 0.01
        else f"{value * 1000:.2f} ms"
    )


def _speed(nbytes: float, value: float | None) -> str:
    return f"{nbytes / value / 2**30:.2f} GiB/s" if value else NOTHING


def tables(parts: Parts) -> list[Table]:
    made = [_limits(parts.get("limits", {}))]
    made += [_saving(kind, parts) for kind in ("replicated", "sharded")]
    made += [_loading(parts), _small(parts.get("small", {})), _planning(parts.get("planning", {}))]
    return [table for table in made if table.rows]


def _limits(rows: Rows) -> Table:
    nbytes = median(rows.get("memcpy"), "state_bytes") or 0.0
    wanted = (
        ("memcpy", "memcpy into warm memory, one core"),
        ("write-cache", "write + fsync, page cache"),
        ("write-direct", "write + fsync, O_DIRECT"),
        ("read-cold-cache", "read cold, page cache"),
        ("read-cold-direct", "read cold, O_DIRECT"),
        ("read-warm", "read warm"),
        ("sha256-1", "SHA-256, one core"),
        ("sha256-2", "SHA-256, two cores"),
        ("xxh3", "XXH3-128, one core"),
    )
    lines: list[tuple[str, ...]] = []
    bars: list[tuple[str, float]] = []
    for prefix, title in wanted:
        found = best_of(rows, prefix, "seconds_s")
        if found is None:
            continue
        files = found[0].rpartition("-")[2] if prefix.startswith(("write", "read")) else ""
        lines.append((title, files or NOTHING, seconds(found[1]), _speed(nbytes, found[1])))
        bars.append((title, nbytes / found[1] / 2**30))
    columns = (f"{nbytes / 2**20:.0f} MiB", "files or threads, best of 1, 2, 4", "median", "speed")
    return Table("limits", "The machine", columns, lines, [Panel("GiB/s", bars)])


def _saving(kind: str, parts: Parts) -> Table:
    during, still = parts.get(f"save-{kind}", {}), parts.get(f"durable-{kind}", {})
    memory = parts.get(f"memory-{kind}", {})
    columns = (
        kind,
        "stall",
        "worst",
        "slowdown",
        "durable, training",
        "durable, standing still",
        "CPU",
        "memory",
    )
    lines: list[tuple[str, ...]] = []
    panels: dict[str, list[tuple[str, float]]] = {
        "stall, s": [],
        "slowdown, s": [],
        "durable, standing still, s": [],
    }
    for name, one in SAVERS.items():
        if not any(name in rows for rows in (during, still, memory)):
            continue
        stall, slow = median(during.get(name), "stall_s"), above_none(during, name, "wall_s")
        durable = median(still.get(name), "durable_s")
        cpu, peak = above_none(during, name, "cpu_s"), median(memory.get(name), "peak_bytes")
        lines.append(
            (
                one.title,
                seconds(stall),
                seconds(worst(during.get(name), "stall_s")),
                seconds(slow),
                seconds(median(during.get(name), "durable_s")),
                seconds(durable),
                NOTHING if cpu is None else f"{cpu:.2f} s",
                NOTHING if peak is None else f"{peak / 2**20:.0f} MiB",
            )
        )
        for bars, value in zip(panels.values(), (stall, slow, durable), strict=True):
            if value is not None:
                bars.append((one.title, value))
    if lines:
        lines += _saving_limits(during, still)
        if limit := best_of(still, "write-", "durable_s"):
            panels["durable, standing still, s"].append(("write + fsync", limit[1]))
        if (copy := median(during.get("memcpy"), "stall_s")) is not None:
            panels["stall, s"].append(("memcpy", copy))
    made = [Panel(title, bars) for title, bars in panels.items() if bars]
    return Table(f"save_{kind}", f"Saving, {kind} state", columns, lines, made)


def _saving_limits(during: Rows, still: Rows) -> list[tuple[str, ...]]:
    lines = []
    copy = median(during.get("memcpy"), "stall_s") or median(still.get("memcpy"), "stall_s")
    if copy is not None:
        lines.append(("limit: memcpy of a rank's part", seconds(copy), *[NOTHING] * 6))
    if limit := best_of(still, "write-", "durable_s"):
        how, files = limit[0].split("-")[1:]
        way = f"limit: write + fsync, {'O_DIRECT' if how == 'direct' else 'page cache'}, files: {files}"
        lines.append((way, *[NOTHING] * 4, seconds(limit[1]), NOTHING, NOTHING))
    return lines


def _loading(parts: Parts) -> Table:
    cases = [case for case in LOAD_CASES if f"load-{case}" in parts]
    names = [case.replace("-", " → ") for case in cases]
    columns = ("load", *(f"{name}, {how}" for name in names for how in ("cold", "warm")))
    lines, panels = [], [Panel(f"{name}, {how}, s", []) for name in names for how in ("cold", "warm")]
    if not cases:
        return Table("load", "Loading", columns, [])
    titles = {name: one.title.partition(",")[0] for name, one in LOADERS.items()}
    titles |= {
        "ours": "ours, verified",
        "dcp": "DCP load, unverified",
        "torch": "torch.load, mapped, unverified",
    }
    titles["safetensors"] = "safetensors, unverified"
    for name in (*LOADERS, "read-"):
        values: list[float | None] = []
        for case in cases:
            rows = parts[f"load-{case}"]
            for how in ("cold_s", "warm_s"):
                found = best_of(rows, name, how) if name == "read-" else None
                values.append(median(rows.get(name), how) if name != "read-" else found[1] if found else None)
        title = titles.get(name, "limit: read, the best way")
        lines.append((title, *map(seconds, values)))
        for panel, value in zip(panels, values, strict=True):
            if value is not None:
                panel.bars.append((title, value))
    return Table("load", "Loading a sharded state in another world", columns, lines, panels)


def _small(rows: Rows) -> Table:
    measures = (
        ("stall_s", "stall"),
        ("save_s", "durable"),
        ("cold_s", "load, cold"),
        ("warm_s", "load, warm"),
    )
    lines = [
        (one.title, *(seconds(median(rows[name], measure)) for measure, _ in measures))
        for name, one in SMALL_SAVERS.items()
        if name in rows
    ]
    panels = [
        Panel(
            f"{title}, s",
            [
                (one.title, median(rows[name], measure) or 0.0)
                for name, one in SMALL_SAVERS.items()
                if name in rows
            ],
        )
        for measure, title in measures[1:]
    ]
    return Table("small", "Many small tensors", ("", *(title for _, title in measures)), lines, panels)


def _planning(rows: Rows) -> Table:
    worlds = planning_worlds(rows)
    lines = []
    panels = [Panel(f"{world} ranks, s", []) for world in worlds]
    for name, title in (("ours", "ours"), ("dcp", "DCP, default planner")):
        measures = rows.get(name)
        if measures is None:
            continue
        cells = []
        for world, panel in zip(worlds, panels, strict=True):
            whole = planning_s(measures, world)
            cells += [seconds(median(measures, f"local_{world}_s")), _whole(whole)]
            panel.bars.append((title, whole[0] if whole else 0.0))
        largest = median(measures, "largest_measured_ranks")
        lines.append((title, *cells, f"{largest:.0f}" if largest else NOTHING))
    columns = ("", *(name for world in worlds for name in (f"{world} ranks: a rank", "in all")))
    return Table("planning", "Planning", (*columns, "largest world measured"), lines, panels)


def _whole(whole: tuple[float, bool] | None) -> str:
    if whole is None:
        return NOTHING
    return f"{seconds(whole[0])}{', extrapolated' if whole[1] else ''}"
