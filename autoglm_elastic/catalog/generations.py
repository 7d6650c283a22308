"""A new generation without an agent that numbers them: by hand, by an import, or by a program that resumes.

Its record (core/lineage.py) says what it extends; whatever an older generation still writes is outside of the lineage
from then on."""

from __future__ import annotations

from autoglm_elastic.catalog.format import CatalogEntry
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.core import lineage
from autoglm_elastic.core.lineage import GenerationRecord
from autoglm_elastic.errors import PlatformError, UsageError
from autoglm_elastic.ports import Outcome


def next_number(catalog: Catalog) -> int:
    """The first number that no record and no entry has used."""
    used = [lineage.parse_entry_name(name).generation for name in catalog.names()]
    used += [record.number for record in catalog.records()]
    return max(used, default=0) + 1


def newest_number(catalog: Catalog) -> int:
    """Of the newest record; 0 where there is none."""
    return max((record.number for record in catalog.records()), default=0)


def extend(catalog: Catalog, entry: CatalogEntry | None, tier: str) -> GenerationRecord:
    """Puts the record of a new generation that extends `entry`; None: that begins from nothing.

    Raises:
        UsageError: the entry's generation is outside of every lineage.
        PlatformError: the record could not be written, or somebody else took the number.
    """
    number = next_number(catalog)
    if entry is None:
        record = GenerationRecord(number, -1, -1, None, tier)
        put(catalog, record)
        return record
    records = catalog.records()
    if not records:
        put(catalog, GenerationRecord(entry.generation, -1, -1, None, tier))
    elif entry.generation not in {record.number for record in records}:
        raise UsageError(
            f"{entry.name} is of generation {entry.generation}, of which there is no record",
            valid="a snapshot that a job of this run directory committed",
        )
    record = GenerationRecord(number, entry.generation, entry.step, entry.name, tier)
    put(catalog, record)
    return record


def put(catalog: Catalog, record: GenerationRecord) -> None:
    """Raises PlatformError."""
    if catalog.put_generation(record) is not Outcome.OK:
        raise PlatformError(
            f"the record of generation {record.number} could not be put",
            do="see whether a job has started here, and try again",
        )
