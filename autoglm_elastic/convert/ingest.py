"""Import: a foreign state becomes a committed snapshot, a chunk at a time, from several files in parallel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from autoglm_elastic.catalog import failpoints, generations, limits, packs
from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog.decide import Decide, Request
from autoglm_elastic.catalog.dtypes import BY_NAME, DType
from autoglm_elastic.catalog.format import Box
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.merge import structure_digest
from autoglm_elastic.catalog.removal import remove
from autoglm_elastic.convert._select import OnBytes
from autoglm_elastic.core.commit import Snapshot, Verdict, Vote, VoteFrom
from autoglm_elastic.core.lineage import GenerationRecord
from autoglm_elastic.errors import ElasticError
from autoglm_elastic.ports import AgingBlobs, StreamBlobs
from autoglm_elastic.snapshot.boxes import part, split
from autoglm_elastic.snapshot.dtypes import versions
from autoglm_elastic.snapshot.stage import memory_of

if TYPE_CHECKING:
    from autoglm_elastic.convert.foreign import Source

TIER: Final = "import"
"""`resumed_tier` of the record."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A chunk to be; it lies inside of `piece`, which the source gives at once."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    box: Box
    piece: Box

    @property
    def nbytes(self) -> int:
        return math.prod(self.box[1]) * self.dtype.nbytes


def ingest(
    blobs: StreamBlobs,
    source: Source,
    *,
    step: int,
    tags: Sequence[str] = (),
    wall: Callable[[], float],
    on_bytes: OnBytes = lambda nbytes: None,
) -> str:
    """Commits a snapshot of what `source` holds. Returns its name.

    It is of a new generation that begins from nothing: the next start resumes from it, and what was there before is
    outside of the lineage, until somebody rolls back to it. Only while no job runs. Raises ElasticError; nothing has
    changed then.
    """
    catalog = Catalog(blobs)
    snapshot = Snapshot(step, generations.next_number(catalog))
    written: list[fmt.Pack] = []
    try:
        since = blobs.now() if isinstance(blobs, AgingBlobs) else None
        parts = list(_parts(source))
        plans = [plan for group in _groups(parts) for plan in packs.plan_packs(group)]
        with ThreadPoolExecutor(limits.READ_THREADS_MAX, thread_name_prefix="autoglm-import") as pool:
            for pack in pool.map(lambda plan: _write(blobs, source, plan, on_bytes), plans):
                written.append(pack)
        cover = fmt.cover((one.name, fmt.elements(one.box[1])) for one in parts)
        digest = structure_digest(source.structure)
        prepared = fmt.Prepared(packs=tuple(written), structure=digest, cover=cover, since=since)
        _commit(blobs, catalog, snapshot, prepared, source, tuple(tags), wall)
    except BaseException:
        if snapshot.entry not in catalog.names():
            remove(blobs, [fmt.pack_path(pack.sha256) for pack in written])
        raise
    record = GenerationRecord(snapshot.generation, -1, -1, None, TIER)
    generations.put(catalog, record)
    catalog.move_hints()
    return snapshot.entry


def _commit(
    blobs: StreamBlobs,
    catalog: Catalog,
    snapshot: Snapshot,
    prepared: fmt.Prepared,
    source: Source,
    tags: tuple[str, ...],
    wall: Callable[[], float],
) -> None:
    verdicts: list[tuple[Verdict, str]] = []
    decide = Decide(
        blobs,
        catalog,
        Request(snapshot, "import", {}, tags, environment=versions()),
        announce=lambda verdict, reason: verdicts.append((verdict, reason)),
        failpoint=failpoints.none,
        wall=wall,
    )
    votes = [VoteFrom(0, snapshot, Vote.PREPARED, fmt.encode(prepared))]
    decide.run(1, votes, {prepared.structure: source.structure})
    if not verdicts or verdicts[0][0] is not Verdict.COMMIT:
        raise ElasticError(f"not imported: {verdicts[0][1] if verdicts else 'nothing was decided'}")


def _parts(source: Source) -> Iterator[_Part]:
    for name, tensor in source.structure.tensors.items():
        dtype = BY_NAME[tensor.dtype]
        for piece in source.boxes(name):
            for box in split(piece, dtype.nbytes, limits.CHUNK_BYTES):
                yield _Part(name, dtype, tensor.shape, box, piece)


def _groups(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """A file for each thread at least, where there is enough for that; the parts of a piece stay together."""
    each = sum(one.nbytes for one in parts) / limits.READ_THREADS_MAX
    group: list[_Part] = []
    nbytes = 0
    for one in parts:
        new_piece = not group or (group[-1].name, group[-1].piece) != (one.name, one.piece)
        if group and new_piece and nbytes >= each:
            yield group
            group, nbytes = [], 0
        group.append(one)
        nbytes += one.nbytes
    if group:
        yield group


def _write(blobs: StreamBlobs, source: Source, plan: packs.PackPlan[_Part], on_bytes: OnBytes) -> fmt.Pack:
    pending = blobs.create(head=len(plan.head))
    try:
        digests = []
        held: tuple[str, Box, torch.Tensor] | None = None
        for one in plan.parts:
            if held is None or held[:2] != (one.name, one.piece):
                held = (one.name, one.piece, source.read(one.name, one.piece))
            inside = part(held[2], one.piece, one.box)
            view = memory_of(inside.resolve_conj().resolve_neg().contiguous())
            digests.append(packs.chunk_digest(view))
            pending.write(view)
            on_bytes(view.nbytes)
        head, sha256 = packs.fill(plan.head, plan.digests_at, b"".join(digests))
        pending.publish(fmt.pack_path(sha256), head)
    except BaseException:
        pending.discard()
        raise
    return fmt.Pack(sha256, len(head) + plan.nbytes, len(head), 0)
