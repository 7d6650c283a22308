"""The fence: which snapshots belong to the job's one line of descent.

A generation writes, before its first step, an immutable record of what it extends: generation `parent` at
`resumed_step`. Walking from the newest record to its parents, a snapshot of generation g counts only up to
the step at which g was left. A coordinator that was paused and wakes up can therefore put its entry whenever
it likes: if the job went on without it, the entry is not in the lineage, and nobody resumes from it. No
compare-and-swap is needed for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

STEP_DIGITS: Final = 12
"""Entry names are padded so that the order of names is the order of steps."""


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """Generation `number` extends generation `parent` at `resumed_step` (-1 and -1: it starts from nothing).

    `parent` is the generation *of the state* that was resumed (`Plan.generation`), which need not be the one
    sealed just before: that one may never have taken a step. `resumed_entry` names the snapshot, if it was
    one.
    """

    number: int
    parent: int
    resumed_step: int
    resumed_entry: str | None
    resumed_tier: str

    def __post_init__(self) -> None:
        if self.parent >= self.number:
            raise ValueError(f"generation {self.number} cannot extend generation {self.parent}")
        if (self.parent < 0) != (self.resumed_step < 0):
            raise ValueError(f"generation {self.number}: parent {self.parent} at step {self.resumed_step}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GenerationRecord:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not write."""
        entry = data["resumed_entry"]
        return cls(
            number=int(data["number"]),
            parent=int(data["parent"]),
            resumed_step=int(data["resumed_step"]),
            resumed_entry=None if entry is None else str(entry),
            resumed_tier=str(data["resumed_tier"]),
        )


@dataclass(frozen=True, slots=True)
class EntryFact:
    """What the lineage needs to know of a catalog entry."""

    name: str
    step: int
    generation: int


def spans(
    records: Iterable[GenerationRecord], head_generation: int | None = None
) -> dict[int, tuple[int, int | None]]:
    """The lineage as generation → (first step, last step) that counts; the last of the head is None: open.

    `head_generation` defaults to the newest record; records newer than it are left out. A parent without a
    record never took a step: the walk goes on at the newest older record.
    """
    known = {record.number: record for record in records}
    line: dict[int, tuple[int, int | None]] = {}
    number = max(known, default=-1) if head_generation is None else head_generation
    last: int | None = None
    while number >= 0:
        record = known.get(number)
        if record is None:
            number = max((other for other in known if other < number), default=-1)
            continue
        line[number] = (record.resumed_step, last)
        last = record.resumed_step if last is None else min(last, record.resumed_step)
        number = record.parent
    return line


def in_lineage(
    entry: EntryFact, records: Iterable[GenerationRecord], head_generation: int | None = None
) -> bool:
    """Whether a snapshot (or a live state) of `entry.generation` at `entry.step` is an ancestor of what the
    head is."""
    return within(entry, spans(records, head_generation))


def newest(entries: Iterable[EntryFact], records: Iterable[GenerationRecord]) -> EntryFact | None:
    """The newest snapshot of the lineage, or None."""
    return next(iter(candidates(entries, records)), None)


def candidates(entries: Iterable[EntryFact], records: Iterable[GenerationRecord]) -> list[EntryFact]:
    """The snapshots of the lineage, newest first. Without any record (a directory of snapshots, no job) all
    count."""
    records = tuple(records)
    line = spans(records)
    mine = [entry for entry in entries if not records or within(entry, line)]
    return sorted(mine, key=lambda entry: (entry.step, entry.generation), reverse=True)


def entry_name(step: int, generation: int) -> str:
    """`<step>-g<generation>`, without a suffix; names sort by step."""
    if step < 0 or generation < 0:
        raise ValueError(f"no snapshot at step {step} of generation {generation}")
    return f"{step:0{STEP_DIGITS}d}-g{generation}"


def parse_entry_name(name: str) -> EntryFact:
    """The inverse of `entry_name`; a `.json` suffix is accepted and dropped. Raises ValueError for anything
    else."""
    stem = name.removesuffix(".json")
    step, separator, generation = stem.partition("-g")
    if not (
        separator and step.isascii() and step.isdigit() and generation.isascii() and generation.isdigit()
    ):
        raise ValueError(f"not the name of a snapshot: {name!r} (valid: <step>-g<generation>)")
    fact = EntryFact(stem, int(step), int(generation))
    if entry_name(fact.step, fact.generation) != stem:
        raise ValueError(
            f"not the name of a snapshot: {name!r} (valid: {entry_name(fact.step, fact.generation)!r})"
        )
    return fact


def within(entry: EntryFact, line: Mapping[int, tuple[int, int | None]]) -> bool:
    """`in_lineage` for a line that `spans` gave."""
    span = line.get(entry.generation)
    if span is None:
        return False
    first, last = span
    return first <= entry.step and (last is None or entry.step <= last)
