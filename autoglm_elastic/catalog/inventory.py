"""What a run directory holds, for people: every snapshot with its tags and its place in the lineage, and how a person
names one. Reads only; the structs below are what `autoglm ckpt … --json` prints (docs/ckpt.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog.index import Catalog, facts
from autoglm_elastic.catalog.opened import OpenPacks
from autoglm_elastic.catalog.tags import HEAD_WORDS, Tags
from autoglm_elastic.core import lineage
from autoglm_elastic.errors import CorruptSnapshot, ElasticError, UsageError
from autoglm_elastic.ports import StreamBlobs

_SHOWN_MAX = 5


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot. `in_lineage`: a job may resume from it. `head`: it would resume from this one."""

    name: str
    step: int
    generation: int
    wall_time: float
    kind: str
    nbytes: int
    tensors: int
    world_size: int
    tags: tuple[str, ...]
    metrics: dict[str, float]
    in_lineage: bool
    head: bool
    parent: str | None


class PackRow(msgspec.Struct, frozen=True, kw_only=True):
    """One pack. `chunks` is null where its header cannot be read."""

    sha256: str
    file: str
    nbytes: int
    rank: int
    chunks: int | None


class TensorRow(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Detail(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one snapshot but its values."""

    snapshot: Row
    manifest: str
    manifest_bytes: int
    config_digest: str | None
    environment: dict[str, str]
    packs: tuple[PackRow, ...]
    tensors: tuple[TensorRow, ...]
    tree: Any
    """The state's structure: containers, tensors by name, other values (docs/format.md)."""


class Inventory:
    """The snapshots of a run directory at one moment."""

    def __init__(self, blobs: StreamBlobs, catalog: Catalog) -> None:
        self._blobs, self._catalog = blobs, catalog
        self.entries: dict[str, fmt.CatalogEntry] = {}
        """By name, oldest step first."""
        self.damaged: dict[str, str] = {}
        """Entries that do not decode: name → why."""
        for name, entry in catalog.all().items():
            if isinstance(entry, CorruptSnapshot):
                self.damaged[name] = str(entry)
            else:
                self.entries[name] = entry
        self.records = catalog.records()
        self.tags = Tags(blobs).all()
        line = lineage.candidates(facts(self.entries.values()), self.records)
        self.line = [fact.name for fact in line]
        """Names of the lineage, newest first."""

    @property
    def head(self) -> str | None:
        return self.line[0] if self.line else None

    def tags_of(self, entry: fmt.CatalogEntry) -> tuple[str, ...]:
        mine = {tag for tag, name in self.tags.items() if name == entry.name}
        return tuple(sorted(mine | {tag for tag in entry.tags if tag not in self.tags}))

    def rows(self) -> list[Row]:
        """Oldest step first."""
        return [self.row(entry) for entry in self.entries.values()]

    def row(self, entry: fmt.CatalogEntry) -> Row:
        return Row(
            name=entry.name,
            step=entry.step,
            generation=entry.generation,
            wall_time=entry.wall_time,
            kind=entry.kind,
            nbytes=entry.nbytes,
            tensors=entry.tensors,
            world_size=entry.world_size,
            tags=self.tags_of(entry),
            metrics=entry.metrics,
            in_lineage=entry.name in self.line,
            head=entry.name == self.head,
            parent=entry.parent,
        )

    def find(self, text: str) -> fmt.CatalogEntry:
        """The snapshot that a person means by HEAD, latest, a step, a name or a tag. Raises UsageError."""
        if text in HEAD_WORDS:
            if self.head is None:
                raise UsageError("no snapshot in the lineage", do="autoglm ckpt ls shows what there is")
            return self.entries[self.head]
        if text in self.entries:
            return self.entries[text]
        if text in self.damaged:
            raise CorruptSnapshot(self.damaged[text])
        if text in self.tags:
            return self._tagged(text)
        if text.isascii() and text.isdigit():
            return self._only(text, (entry for entry in self.entries.values() if entry.step == int(text)))
        given = [entry for entry in self.entries.values() if text in entry.tags]
        if given:
            return ([entry for entry in given if entry.name in self.line] or given)[-1]
        known = list(self.entries)[-_SHOWN_MAX:]
        raise UsageError(
            f"no snapshot {text[:80]!r}",
            valid=f"HEAD, a step, a tag or a name ({', '.join(known)})"
            if known
            else "this run directory has no snapshot",
        )

    def _tagged(self, tag: str) -> fmt.CatalogEntry:
        name = self.tags[tag]
        if name not in self.entries:
            raise UsageError(
                f"tag {tag} names {name}, which is not there", do=f"autoglm ckpt untag RUN {tag}"
            )
        return self.entries[name]

    def _only(self, text: str, found: Iterable[fmt.CatalogEntry]) -> fmt.CatalogEntry:
        """The only one, or the only one of the lineage."""
        some = list(found)
        mine = [entry for entry in some if entry.name in self.line]
        if len(some) == 1 or len(mine) == 1:
            return (mine or some)[0]
        if not some:
            steps = sorted({entry.step for entry in self.entries.values()})[-_SHOWN_MAX:]
            raise UsageError(
                f"no snapshot of step {text}", valid=", ".join(map(str, steps)) or "there is no snapshot"
            )
        raise UsageError(f"{text} is ambiguous", valid=", ".join(entry.name for entry in some))

    def detail(self, entry: fmt.CatalogEntry) -> Detail:
        """Reads the manifest and the headers of the packs. Raises CorruptSnapshot for a damaged manifest."""
        manifest = self._catalog.manifest(entry)
        with OpenPacks(self._blobs, manifest) as opened:
            packs = tuple(
                PackRow(
                    sha256=pack.sha256,
                    file=fmt.pack_path(pack.sha256),
                    nbytes=pack.nbytes,
                    rank=pack.rank,
                    chunks=_chunks(opened, number),
                )
                for number, pack in enumerate(manifest.packs)
            )
        tensors = tuple(
            TensorRow(
                name=name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                nbytes=fmt.chunk_nbytes(tensor.dtype, tensor.shape),
            )
            for name, tensor in manifest.tensors.items()
        )
        return Detail(
            snapshot=self.row(entry),
            manifest=entry.manifest,
            manifest_bytes=entry.manifest_bytes,
            config_digest=entry.config_digest,
            environment=manifest.environment,
            packs=packs,
            tensors=tensors,
            tree=manifest.tree,
        )


def _chunks(opened: OpenPacks, number: int) -> int | None:
    try:
        return sum(map(len, opened.chunks(number).values()))
    except ElasticError:
        return None
