"""The version index of a run directory: committed snapshots, the lineage of generations, and the two hints.

The catalog directory is the truth; HEAD and `latest` only show it. What does not decode is not there, and is
reported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import limits, tree
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

    def names(self) -> list[str]:
        """Names of all entries, oldest step first. What is not named like an entry is passed over."""
        found = []
        for path in self._blobs.list(fmt.CATALOG_DIR):
            stem = path.removeprefix(f"{fmt.CATALOG_DIR}/").removesuffix(".json")
            try:
                fact = lineage.parse_entry_name(stem)
            except ValueError:
                continue
            if path == fmt.entry_path(fact.name):
                found.append(fact)
        if len(found) > limits.ENTRIES_MAX:
            raise CorruptSnapshot(
                f"{fmt.CATALOG_DIR} has {len(found)} entries", valid=f"at most {limits.ENTRIES_MAX}"
            )
        return [fact.name for fact in sorted(found, key=lambda fact: (fact.step, fact.generation))]

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

    def entries(self) -> list[fmt.CatalogEntry]:
        """All that decode, of whatever lineage, oldest step first; the others are reported as rejected."""
        good = []
        for name in self.names():
            try:
                entry = self.look(name)
            except CorruptSnapshot as error:
                self._on_event("snapshot.rejected", {"entry": name, "reason": str(error)})
                continue
            if entry is not None:  # else it was collected meanwhile
                good.append(entry)
        return good

    def records(self) -> list[GenerationRecord]:
        """The lineage. Raises CorruptSnapshot: without it nothing can be trusted."""
        records = []
        for path in self._blobs.list(fmt.GENERATION_DIR):
            stem = path.removeprefix(f"{fmt.GENERATION_DIR}/").removesuffix(".json")
            if stem.isascii() and stem.isdigit() and path == fmt.generation_path(int(stem)):
                data = self._blobs.read(path, bytes_max=limits.ENTRY_BYTES_MAX)
                records.append(fmt.parse_generation(data, int(stem), path))
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
        return next(iter(self.candidates()), None)

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
