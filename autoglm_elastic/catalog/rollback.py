"""Back to an older snapshot, on request: one more generation record, and nothing is deleted.

The record says that a new generation extends the snapshot's, at its step. Walking back from it
(core/lineage.py), everything newer is outside of the lineage: no job resumes from it, however late it was
written. The next start takes the next generation number, finds the snapshot as the newest of the lineage, and
goes on from there. Going back to one of the newer snapshots later undoes it."""

from __future__ import annotations

from typing import Final

from autoglm_elastic.catalog import generations
from autoglm_elastic.catalog.index import Catalog, facts
from autoglm_elastic.core import lineage
from autoglm_elastic.core.lineage import EntryFact, GenerationRecord
from autoglm_elastic.errors import UsageError

TIER: Final = "rollback"
"""`resumed_tier` of the record."""


def roll_back(catalog: Catalog, name: str) -> GenerationRecord:
    """The next start resumes from snapshot `name`. Returns the record that says so.

    Only while no job runs here: its generation would be fenced from now on.

    Raises:
        UsageError: no such snapshot, or it is where the next start resumes from anyway.
        ElasticError: as of `generations.extend`.
    """
    entry = catalog.entry(name)
    mine = EntryFact(entry.name, entry.step, entry.generation)
    if lineage.newest(facts(catalog.entries()), catalog.records()) == mine:
        raise UsageError(f"{entry.name} is HEAD: the next start resumes from it anyway")
    record = generations.extend(catalog, entry, TIER)
    catalog.move_hints()
    return record
