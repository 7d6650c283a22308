"""The version index of a run directory: committed snapshots, the lineage of generations, and the two hints.

The catalog directory is the truth; HEAD and `latest` only show it. What does not decode is not there, and is
reported. Entries and records are immutable and read once; what there is a listing decides each time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import limits, tree
from autoglm_elastic.catalog.documents import Documents
from autoglm_elastic.core import lineage
from autoglm_elastic.core.lineage import EntryFact, GenerationRecord
from autoglm_elastic.errors import CorruptSnapshot, ElasticError, PlatformError, UsageError
from autoglm_elastic.ports import Outcome, StreamBlobs

OnEvent = Callable[[str, dict[str, Any]], None]
"""(name, fields), as in autoglm_elastic.observe.events."""


def no_event(name: str, fields: dict[str, Any]) -> None:
    """Nobody listens."""


class Catalog:
    def __init__(self, blobs: StreamBlobs, on_event: OnEvent = no_event) -> None:
        self._blobs, self._on_event = blobs, on_event
        self._entries = Documents(blobs, lambda data, path: fmt.parse_entry(data, _stem(path), path))
        self._records = Documents(
            blobs, lambda data, path: fmt.parse_generation(data, int(_stem(path)), path)
        )
        self._told: dict[str, str] = {}

    def names(self) -> list[str]:
        """Names of all entries, oldest step first. What is not named like an entry is passed over."""
        return [fact.name for fact in _entry_facts(self._blobs.list(fmt.CATALOG_DIR))]

    def look(self, name: str) -> fmt.CatalogEntry | None:
        """The entry, or None when it is not there. Raises UsageError for what is no entry's name or of a newer format,
        CorruptSnapshot when it does not decode."""
        path = fmt.entry_path(name)
        try:
            lineage.parse_entry_name(name)
            data = self._blobs.read(path, bytes_max=limits.ENTRY_BYTES_MAX)
        except ValueError as error:
            raise UsageError(str(error)) from error
        except FileNotFoundError:
            return None
        return fmt.parse_entry(data, name, path)

    def entry(self, name: str) -> fmt.CatalogEntry:
        """Raises UsageError when there is none of that name, CorruptSnapshot when it does not decode."""
        entry = self.look(name)
        if entry is None:
            known = self.names()
            raise UsageError(
                f"no snapshot {name!r}", valid=", ".join(known[-5:]) or "this run directory has no snapshot"
            )
        return entry

    def all(self) -> dict[str, fmt.CatalogEntry | CorruptSnapshot]:
        """Every entry of whatever lineage by its name, oldest step first, or what is wrong with it."""
        return {name: document for name, (_, document) in self._stamped().items()}

    def _stamped(self) -> dict[str, tuple[str, fmt.CatalogEntry | CorruptSnapshot]]:
        stamps = self._entries.stamps(fmt.CATALOG_DIR)
        paths = [fmt.entry_path(fact.name) for fact in _entry_facts(stamps)]
        found = self._entries.all({path: stamps[path] for path in paths})
        return {_stem(path): (stamps[path], document) for path, document in found.items()}

    def entries(self) -> list[fmt.CatalogEntry]:
        """All that decode, of whatever lineage, oldest step first; the others are reported as rejected."""
        good = []
        for name, (stamp, entry) in self._stamped().items():
            if isinstance(entry, CorruptSnapshot):
                self._reject(name, stamp, entry)
            else:
                good.append(entry)
        return good

    def _reject(self, name: str, stamp: str, error: CorruptSnapshot) -> None:
        """Reported once as long as the file stays the same: whoever commits looks at all of them each time."""
        told = f"{stamp} {error}"
        if self._told.get(name) != told:
            self._told[name] = told
            self._on_event("snapshot.rejected", {"entry": name, "reason": str(error)})

    def records(self) -> list[GenerationRecord]:
        """The lineage. Raises CorruptSnapshot: without it nothing can be trusted."""
        stamps = self._records.stamps(fmt.GENERATION_DIR)
        wanted = {}
        for path, stamp in stamps.items():
            stem = _stem(path)
            if stem.isascii() and stem.isdigit() and path == fmt.generation_path(int(stem)):
                wanted[path] = stamp
        records = []
        for record in self._records.all(wanted).values():
            if isinstance(record, CorruptSnapshot):
                raise record
            records.append(record)
        return sorted(records, key=lambda record: record.number)

    def put_generation(self, record: GenerationRecord) -> Outcome:
        """OK also when the same record is there already; CONFLICT for another one; UNKNOWN only if reading
        fails too."""
        path = fmt.generation_path(record.number)
        data = fmt.generation_file(record)
        outcome = self._blobs.put_if_absent(path, data)
        if outcome is Outcome.OK:
            return outcome
        try:
            there = self._blobs.read(path, bytes_max=limits.ENTRY_BYTES_MAX)
        except (FileNotFoundError, PlatformError):
            return Outcome.UNKNOWN
        return Outcome.OK if there == data else Outcome.CONFLICT

    def candidates(self) -> list[fmt.CatalogEntry]:
        """The entries of the lineage, newest first."""
        entries = {entry.name: entry for entry in self.entries()}
        facts = [EntryFact(entry.name, entry.step, entry.generation) for entry in entries.values()]
        return [entries[fact.name] for fact in lineage.candidates(facts, self.records())]

    def newest(self) -> fmt.CatalogEntry | None:
        """The first of `candidates`, without reading the others: names tell step and generation."""
        there = _entry_facts(self._blobs.list(fmt.CATALOG_DIR))
        for fact in lineage.candidates(there, self.records()):
            path = fmt.entry_path(fact.name)
            entry = self._entries.read(path)
            if isinstance(entry, CorruptSnapshot):
                self._reject(fact.name, self._entries.stamps(fmt.CATALOG_DIR).get(path, ""), entry)
            elif entry is not None:  # else it was collected meanwhile
                return entry
        return None

    def manifest(self, entry: fmt.CatalogEntry) -> fmt.Manifest:
        """Read, compared with its digest and checked. Raises CorruptSnapshot."""
        path = fmt.manifest_path(entry.manifest)
        try:
            data = self._blobs.read(path, bytes_max=min(entry.manifest_bytes, limits.MANIFEST_BYTES_MAX))
        except FileNotFoundError as error:
            raise CorruptSnapshot(f"{path} is missing") from error
        if hashlib.sha256(data).hexdigest() != entry.manifest:
            raise CorruptSnapshot(f"{path}: its SHA-256 differs from its name")
        manifest = fmt.parse_manifest(data, entry, path)
        tree.check(manifest.tree, manifest.tensors, path)
        return manifest

    def entry_present(self, entry: fmt.CatalogEntry) -> bool | None:
        """Whether exactly this entry is there; None when it cannot be read."""
        try:
            return self._blobs.read(
                fmt.entry_path(entry.name), bytes_max=limits.ENTRY_BYTES_MAX
            ) == fmt.encode(entry)
        except FileNotFoundError:
            return False
        except ElasticError:
            return None

    def confirm(self, name: str) -> bool:
        """An entry that somebody else has put is durable when this returns True: putting it again waits for its name.
        False when there is none, or nobody can tell. Raises ElasticError."""
        entry = self.look(name)
        if entry is None:
            return False
        return self._blobs.put_if_absent(fmt.entry_path(name), fmt.encode(entry)) is not Outcome.UNKNOWN

    def move_hints(self) -> bool:
        """HEAD and `latest` show the newest entry of the lineage. False when that failed: nobody depends on
        it."""
        try:
            newest = self.newest()
            if newest is not None:
                self._blobs.replace(fmt.HEAD_NAME, f"{newest.name}\n".encode())
                self._blobs.point(fmt.LATEST_NAME, fmt.entry_path(newest.name))
        except ElasticError:
            return False
        return True


def facts(entries: Iterable[fmt.CatalogEntry]) -> list[EntryFact]:
    return [EntryFact(entry.name, entry.step, entry.generation) for entry in entries]


def _stem(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".json")


def _entry_facts(paths: Iterable[str]) -> list[EntryFact]:
    """Of those that are paths of entries, oldest step first. Raises CorruptSnapshot when there are too many."""
    found = []
    for path in paths:
        try:
            fact = lineage.parse_entry_name(path.removeprefix(f"{fmt.CATALOG_DIR}/").removesuffix(".json"))
        except ValueError:
            continue
        if path == fmt.entry_path(fact.name):
            found.append(fact)
    if len(found) > limits.ENTRIES_MAX:
        raise CorruptSnapshot(
            f"{fmt.CATALOG_DIR} has {len(found)} entries", valid=f"at most {limits.ENTRIES_MAX}"
        )
    return sorted(found, key=lambda fact: (fact.step, fact.generation))
