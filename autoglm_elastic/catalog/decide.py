"""The coordinator's half of a commit: runs the effects of `core.commit.Coordinator` on a run directory.

Order matters and is decided in the core; this room executes: manifest, entry (the commit), announcement,
hints. It never waits for another rank and never raises what is the snapshot's failure."""

from __future__ import annotations

import hashlib
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.failpoints import Failpoints
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.merge import earliest, merge
from autoglm_elastic.catalog.removal import remove
from autoglm_elastic.core import commit as core
from autoglm_elastic.core.commit import Snapshot, Verdict
from autoglm_elastic.errors import CorruptSnapshot, ElasticError
from autoglm_elastic.ports import AgingBlobs, Outcome, StreamBlobs

NONCE: Final = "nonce"
"""Key in a manifest's environment."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a snapshot is to be called. Only the coordinator's counts."""

    snapshot: Snapshot
    kind: str = "full"
    metrics: dict[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    config_digest: str | None = None
    world_size: int | None = None
    """As recorded, where it is not the number of votes."""
    environment: dict[str, str] = field(default_factory=dict)
    """For people: versions of what wrote it."""


class Decide:
    """One snapshot's decision.

    Args:
        announce: called once with the verdict, before the hints are moved.
        wall: seconds since the epoch, for the catalog.
    """

    def __init__(
        self,
        blobs: StreamBlobs,
        catalog: Catalog,
        request: Request,
        *,
        announce: Callable[[Verdict, str], None],
        failpoint: Failpoints,
        wall: Callable[[], float],
    ) -> None:
        self._blobs, self._catalog, self._request = blobs, catalog, request
        self._snapshot = request.snapshot
        self._tell, self._failpoint, self._wall = announce, failpoint, wall
        self._structures: Mapping[str, fmt.Structure] = {}
        self._entry: fmt.CatalogEntry | None = None
        self._since: float | None = None
        self._detail = ""
        self.nbytes = 0
        """Of the whole snapshot, once the manifest is made."""

    def run(
        self,
        world_size: int,
        heard: Iterable[core.VoteFrom | core.PeerLost],
        structures: Mapping[str, fmt.Structure],
    ) -> None:
        """Decides by what was heard of the ranks; what was not heard counts as not prepared.

        Args:
            structures: the ranks' structures by digest.
        """
        self._structures = structures
        machine = core.Coordinator(self._snapshot.generation, world_size)
        events: deque[core.CoordinatorEvent] = deque([core.Trigger(self._snapshot), *heard])
        events.append(core.Timeout(self._snapshot))
        while events:
            machine, effects = machine.step(events.popleft())
            for effect in effects:
                answer = self._execute(effect)
                if answer is not None:
                    events.appendleft(answer)

    def _execute(self, effect: core.CoordinatorEffect) -> core.CoordinatorEvent | None:
        match effect:
            case core.WriteManifest():
                outcome = self._write_manifest(effect.payloads)
                self._failpoint("manifest_written")
                return core.ManifestWritten(self._snapshot, outcome, self._late())
            case core.PutEntry():
                self._failpoint("entry_due")
                outcome = self._put_entry()
                self._failpoint("entry_put")
                return core.EntryPut(self._snapshot, outcome, self._late())
            case core.ReadEntry():
                present = None if self._entry is None else self._catalog.entry_present(self._entry)
                return core.EntryRead(self._snapshot, present, self._late())
            case core.TakeBack():
                self._take_back()
            case core.MoveHints():
                moved = self._catalog.move_hints()
                self._failpoint("hints_moved")
                return core.HintsMoved(self._snapshot, moved)
            case core.Announce():
                detail = f": {self._detail}" if effect.reason and self._detail else ""
                self._tell(effect.verdict, effect.reason + detail)
                self._failpoint("announced")
        return None

    def _write_manifest(self, payloads: tuple[bytes, ...]) -> Outcome:
        try:
            data = self._manifest(payloads)
            return self._blobs.put_if_absent(fmt.manifest_path(hashlib.sha256(data).hexdigest()), data)
        except ElasticError as error:
            self._detail = str(error)
            return Outcome.UNKNOWN

    def _manifest(self, payloads: tuple[bytes, ...]) -> bytes:
        """The manifest's bytes; keeps the entry that will name it. Raises ElasticError."""
        request, snapshot = self._request, self._snapshot
        prepared = [
            fmt.decode(payload, fmt.Prepared, f"the vote of rank {rank}")
            for rank, payload in enumerate(payloads)
        ]
        manifest = merge(
            prepared,
            self._structures,
            step=snapshot.step,
            generation=snapshot.generation,
            world_size=request.world_size or len(prepared),
            environment=request.environment,
            config_digest=request.config_digest,
        )
        if not manifest.packs:  # the packs' names make it unlike every other one (docs/format.md)
            environment = {**manifest.environment, NONCE: secrets.token_hex(16)}
            manifest = msgspec.structs.replace(manifest, environment=environment)
        fmt.check_manifest(manifest, "the state as the ranks gave it")
        data = fmt.encode(manifest)
        if len(data) > limits.MANIFEST_BYTES_MAX:
            raise CorruptSnapshot(
                f"a manifest of {len(data)} bytes", valid=f"at most {limits.MANIFEST_BYTES_MAX}"
            )
        self.nbytes = sum(pack.nbytes for pack in manifest.packs)
        parent = self._catalog.newest()
        entry = fmt.CatalogEntry(
            format=limits.FORMAT_NAME,
            version=limits.FORMAT_VERSION,
            name=snapshot.entry,
            step=snapshot.step,
            generation=snapshot.generation,
            manifest=hashlib.sha256(data).hexdigest(),
            manifest_bytes=len(data),
            kind=request.kind,
            nbytes=self.nbytes,
            tensors=len(manifest.tensors),
            world_size=manifest.world_size,
            wall_time=self._wall(),
            parent=parent.name if parent else None,
            metrics=request.metrics,
            tags=request.tags,
            config_digest=request.config_digest,
        )
        self._entry, self._since = fmt.sealed(entry), earliest(prepared)
        entry_nbytes = len(fmt.encode(self._entry))
        if entry_nbytes > limits.ENTRY_BYTES_MAX:
            raise CorruptSnapshot(
                f"metrics and tags of {entry_nbytes} bytes", valid=f"{limits.ENTRY_BYTES_MAX}"
            )
        return data

    def _late(self) -> bool | None:
        """Whether the packs may be collected by now as if nobody ever wanted them; None when that cannot be told."""
        if self._since is None or not isinstance(self._blobs, AgingBlobs):
            return False
        try:
            return self._blobs.now() - self._since >= limits.COMMIT_S_MAX
        except ElasticError as error:
            self._detail = str(error)
            return None

    def _take_back(self) -> None:
        if self._entry is not None and self._catalog.entry_present(self._entry):
            remove(self._blobs, [fmt.entry_path(self._entry.name)])

    def _put_entry(self) -> Outcome:
        if self._entry is None:
            return Outcome.UNKNOWN
        try:
            return self._blobs.put_if_absent(fmt.entry_path(self._entry.name), fmt.encode(self._entry))
        except ElasticError as error:
            self._detail = str(error)
            return Outcome.UNKNOWN
