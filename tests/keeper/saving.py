"""A snapshot as production makes it, without processes: the keeper's writer, then the coordinator's decision, then
garbage collection; and what may be found of it afterwards."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from autoglm_elastic.catalog import failpoints
from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog.collect import Collected, Collector
from autoglm_elastic.catalog.decide import Decide, Request
from autoglm_elastic.catalog.failpoints import Failpoints
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.verify import verify
from autoglm_elastic.core.commit import Snapshot, Verdict, Vote, VoteFrom
from autoglm_elastic.core.retention import Retention
from autoglm_elastic.errors import CorruptSnapshot
from autoglm_elastic.keeper.writer import Result, Writer
from autoglm_elastic.ports import StreamBlobs
from autoglm_elastic.storage import LocalBlobs
from tests.keeper.state import Share

WAIT_S = 60.0
FROZEN = 0xEE
"""The bytes of the last tensor, in every snapshot: its pack is shared."""
WALL = 1_700_000_000.0


def written(blobs: StreamBlobs, share: Share, step: int, writer: Writer | None = None) -> Result:
    """The packs of one rank through the keeper's writer."""
    segment: Any = SimpleNamespace(memory=memoryview(bytearray(share.nbytes)))
    share.fill(segment, step)
    last = share.images[-1]
    data = last.start + last.head_nbytes
    segment.memory[data : last.start + last.nbytes] = bytes([FROZEN]) * (last.nbytes - last.head_nbytes)
    results: list[Result] = []
    done = threading.Event()

    def on_done(result: Result) -> None:
        results.append(result)
        done.set()

    mine = writer or Writer(blobs, failpoints.none)
    mine.start(segment.memory, tuple(share.images), share.rank, on_done)
    if not done.wait(WAIT_S):
        raise TimeoutError("the writer does not answer")
    if writer is None:
        mine.close()
    return results[0]


def prepared(share: Share, result: Result) -> fmt.Prepared:
    return msgspec.structs.replace(
        fmt.decode(share.vote, fmt.Prepared, "the vote"), packs=result.packs, since=result.since
    )


def decided(
    blobs: StreamBlobs, share: Share, step: int, result: Result, failpoint: Failpoints = failpoints.none
) -> tuple[Verdict, str]:
    """What the coordinator of a world of one rank decides."""
    snapshot = Snapshot(step, 0)
    verdicts: list[tuple[Verdict, str]] = []
    vote = prepared(share, result)
    Decide(
        blobs,
        Catalog(blobs),
        Request(snapshot),
        announce=lambda verdict, reason: verdicts.append((verdict, reason)),
        failpoint=failpoint,
        wall=lambda: WALL + step,
    ).run(1, [VoteFrom(0, snapshot, Vote.PREPARED, fmt.encode(vote))], {vote.structure: share.structure})
    (verdict,) = verdicts
    return verdict


def collect(blobs: LocalBlobs, keep_last: int = 1) -> Collected:
    """One pass, for which nobody reads or writes: what is given up goes at once."""
    policy = Retention(keep_last=keep_last, keep_abandoned_hours=0)
    return Collector(blobs, policy, grace_s=0, age_s=0, wall=lambda: WALL).run()


def whole(run_dir: Path) -> tuple[list[int], list[str]]:
    """(steps that are in the catalog and verify, what is wrong)."""
    blobs = LocalBlobs(run_dir)
    catalog = Catalog(blobs)
    steps, wrong = [], []
    for name in catalog.names():
        try:
            entry = catalog.look(name)
        except CorruptSnapshot as error:
            wrong.append(f"visible but damaged: {error}")
            continue
        if entry is None:
            raise AssertionError(f"{name} went away while nobody else was there")
        problems = verify(blobs, catalog, entry)
        wrong += [f"visible but damaged: {problem}" for problem in problems]
        if problems:
            continue
        for pack in catalog.manifest(entry).packs:
            data = set(blobs.read(fmt.pack_path(pack.sha256), bytes_max=1 << 30)[pack.head :])
            if data not in ({entry.step}, {FROZEN}):
                wrong.append(f"a mixture: {data} in step {entry.step}")
        steps.append(entry.step)
    if not wrong:
        try:
            newest = catalog.newest()
        except CorruptSnapshot as error:
            return steps, [f"the lineage is damaged: {error}"]
        if (newest.step if newest else None) != max(steps, default=None):
            wrong.append(f"the newest is {newest}, but there are {steps}")
    return steps, wrong


def reached(run_dir: Path) -> tuple[set[str], set[str]]:
    """Packs and manifests: (those that entries name, those that are there)."""
    blobs = LocalBlobs(run_dir)
    catalog = Catalog(blobs)
    named = set()
    for entry in catalog.entries():
        named.add(fmt.manifest_path(entry.manifest))
        named |= {fmt.pack_path(pack.sha256) for pack in catalog.manifest(entry).packs}
    return named, {*blobs.list(fmt.PACK_DIR), *blobs.list(fmt.MANIFEST_DIR)}
