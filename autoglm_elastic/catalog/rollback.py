"""Back to an older snapshot, on request: one more generation record, and nothing is deleted.

The record says that a new generation extends the snapshot's, at its step. Walking back from it
(core/lineage.py), everything newer is outside of the lineage: no job resumes from it, however late it was
written. The next start takes the next generation number, finds the snapshot as the newest of the lineage, and
goes on from there. Going back to one of the newer snapshots later undoes it."""

from __future__ import annotations

from typing import Final

from autoglm_elastic.catalog.index import Catalog, facts
from autoglm_elastic.core import lineage
from autoglm_elastic.core.lineage import EntryFact, GenerationRecord
from autoglm_elastic.errors import PlatformError, UsageError
from autoglm_elastic.ports import Outcome

TIER: Final = "rollback"
"""`resumed_tier` of the record."""


def next_generation(catalog: Catalog) -> int:
    """The first number that no record and no entry has used."""
    used = [lineage.parse_entry_name(name).generation for name in catalog.names()]
    used += [record.number for record in catalog.records()]
    return max(used, default=0) + 1


def roll_back(catalog: Catalog, name: str) -> GenerationRecord:
    """The next start resumes from snapshot `name`. Returns the record that says so.

    Only while no job runs here: its generation would be fenced from now on.

    Raises:
        UsageError: no such snapshot, or it is where the next start resumes from anyway.
        PlatformError: the record could not be written, or somebody else took the generation number.
    """
    entry = catalog.entry(name)
    records = catalog.records()
    mine = EntryFact(entry.name, entry.step, entry.generation)
    if lineage.newest(facts(catalog.entries()), records) == mine:
        raise UsageError(f"{entry.name} is HEAD: the next start resumes from it anyway")
    if not records:
        _put(catalog, GenerationRecord(entry.generation, -1, -1, None, TIER))
    elif entry.generation not in {record.number for record in records}:
        raise UsageError(
            f"{entry.name} is of generation {entry.generation}, of which there is no record",
            valid="a snapshot that a job of this run directory committed",
        )
    number = next_generation(catalog)
    record = GenerationRecord(number, entry.generation, entry.step, entry.name, TIER)
    _put(catalog, record)
    catalog.move_hints()
    return record


def _put(catalog: Catalog, record: GenerationRecord) -> None:
    if catalog.put_generation(record) is not Outcome.OK:
        raise PlatformError(
            f"the record of generation {record.number} could not be put",
            do="see whether a job has started here, and try again",
        )
