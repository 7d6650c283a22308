"""What one rank has prepared, as a durable record: with the records of all ranks anybody can decide a snapshot
after the ranks themselves are gone.

    prepared/<entry>/<rank>.json        the vote of a rank, its packs, and what rank 0 wanted it to be called
    prepared/<entry>/<sha256>.json      what the rank knew of the state's structure; ranks that knew the same share it

Put if absent, sealed. A record of an entry that is in the catalog, or that the lineage has passed, means
nothing any more. Reads and writes through `ports.StreamBlobs` only."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable
from typing import Final

import msgspec

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import limits, tree
from autoglm_elastic.catalog.decide import Request
from autoglm_elastic.core.commit import Snapshot
from autoglm_elastic.core.lineage import parse_entry_name
from autoglm_elastic.errors import CorruptSnapshot, ElasticError, PlatformError
from autoglm_elastic.ports import Outcome, StreamBlobs

PREPARED_DIR: Final = "prepared"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`decide.Request` without its snapshot."""

    kind: str
    metrics: dict[str, float]
    tags: tuple[str, ...]
    config_digest: str | None
    world_size: int | None
    environment: dict[str, str]

    @classmethod
    def of(cls, request: Request) -> Wish:
        return cls(
            kind=request.kind,
            metrics=request.metrics,
            tags=request.tags,
            config_digest=request.config_digest,
            world_size=request.world_size,
            environment=request.environment,
        )

    def request(self, snapshot: Snapshot) -> Request:
        return Request(
            snapshot,
            self.kind,
            self.metrics,
            self.tags,
            self.config_digest,
            self.world_size,
            self.environment,
        )


class Details(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a coordinator needs of a rank beside its vote. `wish`: rank 0's; the others' may be None."""

    structure: fmt.Structure
    wish: Wish | None = None


class Record(fmt.Sealed, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One rank's. `structure`: SHA-256 of its structure's document, values included."""

    step: int
    generation: int
    rank: int
    world_size: int
    prepared: fmt.Prepared
    structure: str
    wish: Wish | None = None


def directory(entry: str) -> str:
    return f"{PREPARED_DIR}/{entry}"


def put(
    blobs: StreamBlobs,
    snapshot: Snapshot,
    rank: int,
    world_size: int,
    prepared: fmt.Prepared,
    details: Details,
) -> None:
    """Durable when this returns; put before by the same rank is as good. Raises ElasticError."""
    structure = fmt.encode(details.structure)
    sha256 = hashlib.sha256(structure).hexdigest()
    record = fmt.sealed(
        Record(
            step=snapshot.step,
            generation=snapshot.generation,
            rank=rank,
            world_size=world_size,
            prepared=prepared,
            structure=sha256,
            wish=details.wish,
        )
    )
    for name, data in ((sha256, structure), (str(rank), fmt.encode(record))):
        path = f"{directory(snapshot.entry)}/{name}.json"
        if blobs.put_if_absent(path, data) is Outcome.UNKNOWN:
            raise PlatformError(f"{path} was not confirmed to be durable")


def ranks(blobs: StreamBlobs, entry: str) -> list[int]:
    """The ranks of which a record is there, sorted."""
    prefix = directory(entry)
    stems = (path.removeprefix(f"{prefix}/").removesuffix(".json") for path in blobs.list(prefix))
    return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit() and len(stem) < 10)


def read(blobs: StreamBlobs, snapshot: Snapshot, rank: int) -> Record:
    """Checked. Raises FileNotFoundError, CorruptSnapshot."""
    path = f"{directory(snapshot.entry)}/{rank}.json"
    record = fmt.decode(blobs.read(path, bytes_max=limits.VOTE_BYTES_MAX), Record, path)
    if record.digest != fmt.sealed(record).digest:
        raise CorruptSnapshot(f"{path}: its digest differs")
    if (Snapshot(record.step, record.generation), record.rank) != (snapshot, rank):
        raise CorruptSnapshot(f"{path} is of rank {record.rank}, step {record.step}")
    if not _SHA256.fullmatch(record.structure) or not 0 <= rank < record.world_size:
        raise CorruptSnapshot(f"{path} contradicts itself")
    return record


def read_structure(blobs: StreamBlobs, entry: str, sha256: str) -> fmt.Structure:
    """Compared with its digest and checked. Raises FileNotFoundError, CorruptSnapshot."""
    path = f"{directory(entry)}/{sha256}.json"
    data = blobs.read(path, bytes_max=limits.VOTE_BYTES_MAX)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptSnapshot(f"{path}: its SHA-256 differs from its name")
    structure = fmt.decode(data, fmt.Structure, path)
    tree.check(structure.tree, structure.tensors, path)
    return structure


def entries(blobs: StreamBlobs) -> list[Snapshot]:
    """Snapshots of which records are there, oldest step first."""
    found = set()
    for path in blobs.list(PREPARED_DIR):
        with contextlib.suppress(ValueError):
            fact = parse_entry_name(path.split("/")[1])
            found.add(Snapshot(fact.step, fact.generation))
    return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.generation))


def packs(blobs: StreamBlobs) -> set[str]:
    """SHA-256 of the packs that records name: not garbage yet. A record that does not decode vouches for
    none."""
    found: set[str] = set()
    for snapshot in entries(blobs):
        for rank in ranks(blobs, snapshot.entry):
            with contextlib.suppress(FileNotFoundError, CorruptSnapshot):
                found.update(pack.sha256 for pack in read(blobs, snapshot, rank).prepared.packs)
    return found


def remove(blobs: StreamBlobs, entry: str) -> None:
    """What cannot be removed stays, as garbage."""
    names: Iterable[str] = ()
    with contextlib.suppress(ElasticError):
        names = blobs.list(directory(entry))
    for name in names:
        with contextlib.suppress(ElasticError):
            blobs.delete(name)
