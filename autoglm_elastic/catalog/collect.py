"""Garbage collection of a run directory: what the retention gives up, and what nothing reaches any more.

It never waits for, or locks out, a job, a writer or a reader. Two rules make that safe:

- *Two phases.* An entry that is given up moves to `retired/` first. Its packs and manifest stay reachable from
  there for a grace, so that whoever reads the snapshot can finish; they go in a later pass.
- *Age.* A pack or manifest that nothing reaches is removed only when it was written longer ago than a
  prepare may take. Packs are listed before it is read what is reachable: what was
  committed since is seen. Nobody relies on a file that he did not write himself within the same prepare: packs
  and manifests have names of their own (packs.fill, decide.py), so no old one is about to be needed again.

Removals are ordered so that a crash between any two leaves every entry that remains whole: entry before packs before
manifest before its record in `retired/`. A tag or a rollback that wins a race against the collection brings a retired
entry back in the next pass, long before its packs are touched.

A snapshot that lacks a pack or its manifest (somebody who was stopped for longer than a prepare may take has put its
entry all the same, and died before he took it back) is no reason to give up another one: it counts for nothing here.

What cannot be read stops the collection: nobody knows what it would have reached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Final

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import limits, prepared
from autoglm_elastic.catalog.failpoints import Failpoints, none
from autoglm_elastic.catalog.index import Catalog, facts
from autoglm_elastic.catalog.inventory import Inventory
from autoglm_elastic.core import lineage
from autoglm_elastic.core.lineage import EntryFact
from autoglm_elastic.core.retention import Kept, Retention, reasons
from autoglm_elastic.errors import CorruptSnapshot
from autoglm_elastic.ports import AgingBlobs, Outcome

RETIRED_DIR: Final = "retired"
POINTS: Final = (
    "retired_put",
    "entry_removed",
    "pack_removed",
    "manifest_removed",
    "retired_removed",
    "entry_restored",
    "record_removed",
)
"""Failpoints, each behind one effect."""


def retired_path(name: str) -> str:
    return f"{RETIRED_DIR}/{name}.json"


@dataclass(slots=True)
class Collected:
    """One pass; of a dry run, what it would have done. `kept`: entry → why. `waiting`: retired, their packs still
    within the grace. `blocked`: why no packs were looked at, "" otherwise. `nbytes`: of the packs and manifests
    removed."""

    kept: dict[str, str] = field(default_factory=dict)
    retired: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    packs: int = 0
    manifests: int = 0
    nbytes: int = 0
    leftovers: int = 0
    blocked: str = ""
    more: bool = False
    """A bound of one pass was reached: there is more to do."""


class Collector:
    """Collects in passes. Not thread safe; remembers what manifests reach, so that a pass reads only new ones.

    Args:
        policy: which entries are given up; None gives up none.
        grace_s: how long retired entries still reach their packs; 0 only where nobody reads.
        age_s: how old a file must be that nothing reaches; below `limits.PREPARE_S_MAX` only where nobody writes.
        wall: seconds since the epoch, for the age of entries outside of the lineage.
    """

    def __init__(
        self,
        blobs: AgingBlobs,
        policy: Retention | None,
        *,
        grace_s: float = limits.GRACE_S,
        age_s: float = limits.GRACE_S,
        wall: Callable[[], float],
        failpoint: Failpoints = none,
    ) -> None:
        self._blobs, self._policy = blobs, policy or Retention()
        self._grace_s, self._age_s, self._wall, self._failpoint = grace_s, age_s, wall, failpoint
        self._catalog = Catalog(blobs)
        self._reach: dict[str, frozenset[str]] = {}

    def run(self, *, dry_run: bool = False) -> Collected:
        """One pass. Raises ElasticError where the directory cannot be read or written, or tags or lineage are
        damaged."""
        done = Collected()
        candidates = self._blobs.ages(fmt.PACK_DIR) | self._blobs.ages(fmt.MANIFEST_DIR)
        self._retire(done, candidates, dry_run)
        self._remove(done, candidates, dry_run)
        if not dry_run:
            done.leftovers = self._settle() + self._blobs.sweep(self._age_s)
        return done

    def _settle(self) -> int:
        """Removes the records of prepares (catalog/prepared.py) that mean nothing any more: committed, fenced, older
        than the newest snapshot, or too old to be committed. How many snapshots had some."""
        there = prepared.entries(self._blobs)
        if not there:
            return 0
        ages = self._blobs.ages(prepared.PREPARED_DIR)
        found = Inventory(self._blobs, self._catalog)
        newest = found.entries[found.head].step if found.head is not None else -1
        settled = 0
        for snapshot in there:
            fact = EntryFact(snapshot.entry, snapshot.step, snapshot.generation)
            fenced = bool(found.records) and not lineage.in_lineage(fact, found.records)
            prefix = f"{prepared.directory(snapshot.entry)}/"
            youngest = min((age for name, age in ages.items() if name.startswith(prefix)), default=0.0)
            late = youngest >= max(self._age_s, limits.PREPARE_S_MAX)
            if snapshot.entry in found.entries or fenced or snapshot.step <= newest or late:
                prepared.remove(self._blobs, snapshot.entry)
                self._failpoint("record_removed")
                settled += 1
        return settled

    def _retire(self, done: Collected, there: Container[str], dry_run: bool) -> None:
        found = Inventory(self._blobs, self._catalog)
        known = self._retired()
        lacking = self._lacking(found.entries, there)
        done.kept = self._kept(found, lacking)
        given_up = [name for name in found.entries if name not in done.kept]
        done.more = len(given_up) > limits.RETIRED_MAX
        given_up = given_up[: limits.RETIRED_MAX]
        if dry_run:
            done.retired = given_up
            return
        for name in given_up:
            if name in known:  # a pass was cut off, or a restored one is given up again: the grace begins now
                self._blobs.delete(retired_path(name))
            self._blobs.put_if_absent(retired_path(name), fmt.encode(found.entries[name]))
            self._failpoint("retired_put")
        # Again, now that whoever comes later finds them retired: a tag or a new lineage may name one of them.
        protected = (
            self._protected(Inventory(self._blobs, self._catalog), lacking)
            if given_up or known
            else frozenset()
        )
        if not set(found.line) - set(lacking):
            protected |= self._last_resort(found, known, there)
        for name in given_up:
            if name in protected:
                self._blobs.delete(retired_path(name))
                continue
            self._blobs.delete(fmt.entry_path(name))
            self._failpoint("entry_removed")
            done.retired.append(name)
        for name, entry in known.items():
            if name not in given_up and (name in protected or name in done.kept):
                self._restore(name, entry, done)

    def _restore(self, name: str, entry: fmt.CatalogEntry, done: Collected) -> None:
        if self._blobs.put_if_absent(fmt.entry_path(name), fmt.encode(entry)) is Outcome.UNKNOWN:
            return
        done.restored.append(name)
        self._failpoint("entry_restored")
        self._blobs.delete(retired_path(name))

    def _last_resort(
        self, found: Inventory, known: Mapping[str, fmt.CatalogEntry], there: Container[str]
    ) -> frozenset[str]:
        """Of the retired ones the newest of the lineage that lacks nothing: what it was given up for was taken back, or
        is damaged."""
        lacking = self._lacking(known, there)
        line = lineage.candidates(facts(known.values()), found.records)
        return frozenset([fact.name for fact in line if fact.name not in lacking][:1])

    def _lacking(self, entries: Mapping[str, fmt.CatalogEntry], there: Container[str]) -> dict[str, str]:
        """Entries of which something is missing, or the manifest is damaged: name → what. `there`: files of a moment
        ago."""
        lacking: dict[str, str] = {}
        for name, entry in entries.items():
            try:
                ((manifest, packs),) = self._reach_of(entry).items()
            except CorruptSnapshot as error:
                lacking[name] = str(error)
                continue
            for path in sorted({manifest, *packs}):
                if path not in there and not self._is_there(path):
                    lacking[name] = f"{path} is missing"
                    break
        return lacking

    def _is_there(self, path: str) -> bool:
        try:
            self._blobs.size(path)
        except FileNotFoundError:
            return False
        return True

    def _kept(self, found: Inventory, lacking: Mapping[str, str]) -> dict[str, str]:
        mine = [
            Kept(
                name=entry.name,
                step=entry.step,
                generation=entry.generation,
                wall_time=entry.wall_time,
                in_lineage=entry.name in found.line,
                tagged=bool(found.tags_of(entry)),
                metrics=entry.metrics,
            )
            for entry in found.entries.values()
            if entry.name not in lacking
        ]
        kept = reasons(self._policy, mine, self._wall())
        for name in self._protected(found, lacking) & set(found.entries):
            kept.setdefault(name, "the lineage begins there")
        return {**kept, **lacking}

    def _protected(self, found: Inventory, lacking: Container[str]) -> frozenset[str]:
        """What is never given up, whether it is in the catalog or retired: tagged, the newest that lacks nothing,
        resumed from last."""
        named = {*found.tags.values(), next((name for name in found.line if name not in lacking), None)}
        if found.records:
            named.add(found.records[-1].resumed_entry)
        return frozenset(name for name in named if name is not None)

    def _retired(self) -> dict[str, fmt.CatalogEntry]:
        """Those that decode."""
        entries = {}
        for path in self._blobs.list(RETIRED_DIR):
            name = path.removeprefix(f"{RETIRED_DIR}/").removesuffix(".json")
            with contextlib.suppress(FileNotFoundError, CorruptSnapshot):
                data = self._blobs.read(path, bytes_max=limits.ENTRY_BYTES_MAX)
                entries[name] = fmt.parse_entry(data, name, path)
        return entries

    def _remove(self, done: Collected, candidates: dict[str, float], dry_run: bool) -> None:
        try:
            reached, expired = self._reached(done)
        except CorruptSnapshot as error:
            done.blocked = str(error)
            return
        packs = [name for name in candidates if name.startswith(f"{fmt.PACK_DIR}/") and name not in reached]
        manifests = [
            name for name in candidates if name.startswith(f"{fmt.MANIFEST_DIR}/") and name not in reached
        ]
        old = {name for name, age in candidates.items() if age >= self._age_s}
        for name in packs:
            if name in old and self._delete(name, done, dry_run):
                done.packs += 1
                self._failpoint("pack_removed")
        for name in manifests:
            if name in old and self._delete(name, done, dry_run):
                done.manifests += 1
                self._failpoint("manifest_removed")
        if not dry_run and not done.more:
            for path in expired:
                self._blobs.delete(path)
                self._failpoint("retired_removed")

    def _delete(self, name: str, done: Collected, dry_run: bool) -> bool:
        if done.packs + done.manifests >= limits.REMOVALS_MAX:
            done.more = True
            return False
        try:
            nbytes = self._blobs.size(name) if dry_run else self._blobs.delete_older(name, self._age_s)
        except FileNotFoundError:
            return False
        done.nbytes += max(0, nbytes)
        return nbytes >= 0

    def _reached(self, done: Collected) -> tuple[set[str], list[str]]:
        """Names of the packs and manifests that an entry reaches, or a prepare that can still be decided, or a retired
        entry within its grace; and the paths of the retired ones past it. Raises CorruptSnapshot when one of them
        cannot be read.

        The catalog is read last, since what was prepared may be committed meanwhile; and before `retired/`, too,
        since another collection may move entries either way."""
        waiting = {fmt.pack_path(sha256) for sha256 in prepared.packs(self._blobs)}
        reach = self._reach_of_catalog()
        ages, retired = self._blobs.ages(RETIRED_DIR), self._retired()
        expired = [path for path, age in ages.items() if age >= self._grace_s]
        for name, entry in retired.items():
            if retired_path(name) not in expired:
                reach |= self._reach_of(entry)
        for path in sorted(set(ages) - set(expired) - {retired_path(name) for name in retired}):
            raise CorruptSnapshot(f"{path} does not decode")
        done.waiting = [name for name in retired if retired_path(name) not in expired]
        reach |= self._reach_of_catalog()
        self._reach = reach
        return waiting.union(reach, *reach.values()), expired

    def _reach_of_catalog(self) -> dict[str, frozenset[str]]:
        reach: dict[str, frozenset[str]] = {}
        for entry in self._catalog.all().values():
            if isinstance(entry, CorruptSnapshot):
                raise entry
            reach |= self._reach_of(entry)
        return reach

    def _reach_of(self, entry: fmt.CatalogEntry) -> dict[str, frozenset[str]]:
        """The path of its manifest → those of its packs."""
        path = fmt.manifest_path(entry.manifest)
        known = self._reach.get(path)
        if known is None:
            manifest = self._catalog.manifest(entry)
            known = self._reach[path] = frozenset(fmt.pack_path(pack.sha256) for pack in manifest.packs)
        return {path: known}
