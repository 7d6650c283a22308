"""One flipped bit in any file that is not a snapshot's own: found, named, and never a reason to remove or commit."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autoglm_elastic.agent.run_dir import RUN_NAME, RunDirectory, check_format, new_info
from autoglm_elastic.agent.snapshot_place import read_info
from autoglm_elastic.catalog import failpoints, limits
from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import prepared as records
from autoglm_elastic.catalog.collect import Collected, Collector
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.tags import Tags
from autoglm_elastic.core.commit import Snapshot
from autoglm_elastic.core.retention import Retention
from autoglm_elastic.errors import CorruptSnapshot, ElasticError
from autoglm_elastic.keeper.finish import Finisher
from autoglm_elastic.snapshot import CheckpointManager
from autoglm_elastic.storage import LocalBlobs
from tests.keeper.saving import WALL, prepared, written
from tests.keeper.state import Share

from .saved import WAIT_S, names, record, save

LONG_S = 1e9


def flips(path: Path) -> Iterator[int]:
    """Each byte of the file in turn, one bit of it; sound again afterwards."""
    sound = path.read_bytes()
    for at in range(len(sound)):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << at % 8]) + sound[at + 1 :])
        yield at
    path.write_bytes(sound)


def collect(run_dir: Path, age_s: float = 0.0) -> Collected:
    """`age_s` 0: nobody else is there, so whatever nothing reaches goes."""
    policy = Retention(keep_last=1, keep_abandoned_hours=0)
    return Collector(LocalBlobs(run_dir), policy, grace_s=LONG_S, age_s=age_s, wall=lambda: WALL).run()


def packs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "packs").rglob("*.safetensors"))


def test_in_a_retired_entry(run_dir: Path) -> None:
    one, _ = save(run_dir, 1, 2)
    assert collect(run_dir).retired == [one]
    path, before = run_dir / "retired" / f"{one}.json", packs(run_dir)
    for at in flips(path):
        assert path.name in collect(run_dir).blocked, at
    assert packs(run_dir) == before
    assert collect(run_dir).waiting == [one]


def test_in_a_tag(run_dir: Path) -> None:
    one, _ = save(run_dir, 1, 2)
    blobs = LocalBlobs(run_dir)
    Tags(blobs).put("best", one, Catalog(blobs), lambda: WALL)
    before = packs(run_dir)
    for at in flips(run_dir / "tags" / "best.json"):
        with pytest.raises(CorruptSnapshot, match=r"^tags/best\.json"):
            Tags(blobs).all()
        with pytest.raises(CorruptSnapshot, match=r"^tags/best\.json"):
            collect(run_dir)
        assert names(run_dir)[0] == one, at
    assert packs(run_dir) == before
    assert Tags(blobs).all() == {"best": one}


def test_in_a_generation_record(run_dir: Path) -> None:
    one, two = save(run_dir, 1, 2)
    record(run_dir, 0)
    record(run_dir, 1, parent=0, step=1, entry=one)
    before = packs(run_dir)
    for number in (0, 1):
        for at in flips(run_dir / "generations" / f"{number}.json"):
            with pytest.raises(CorruptSnapshot, match=rf"^generations/{number}\.json"):
                Catalog(LocalBlobs(run_dir)).newest()
            with pytest.raises(CorruptSnapshot, match=rf"^generations/{number}\.json"):
                collect(run_dir)
            assert names(run_dir) == [one, two], at
    assert packs(run_dir) == before


@pytest.mark.parametrize("which", ["the other's record", "the structure"])
def test_in_what_a_dead_rank_had_prepared(run_dir: Path, which: str) -> None:
    """The keeper of rank 1 finds the damage when it wants to finish the snapshot."""
    blobs, snapshot = LocalBlobs(run_dir), Snapshot(2, 0)
    shares = [Share(rank=rank, world_size=2, elements=64) for rank in (0, 1)]
    votes = [prepared(share, written(blobs, share, 2)) for share in shares]
    details = [fmt.decode(share.details(snapshot), records.Details, "details") for share in shares]
    records.put(blobs, snapshot, 0, 2, votes[0], details[0])
    folder = run_dir / records.directory(snapshot.entry)
    path = folder / "0.json"
    if which == "the structure":
        (path,) = (one for one in folder.iterdir() if one.name != "0.json")
    finisher = Finisher(blobs, failpoints.none, lambda: WALL)
    for at in flips(path):
        with pytest.raises(CorruptSnapshot, match=re.escape(path.name)):
            finisher.finish(snapshot, 1, 2, votes[1], details[1])
        assert Catalog(blobs).names() == [], at
    assert finisher.finish(snapshot, 1, 2, votes[1], details[1])[0].value == "committed"


def test_in_head_which_nothing_reads(run_dir: Path) -> None:
    one, two = save(run_dir, 1, 2)
    for _ in flips(run_dir / fmt.HEAD_NAME):
        with CheckpointManager(run_dir) as manager:
            newest = manager.newest()
        assert newest is not None
        assert newest.name == two
        assert names(run_dir) == [one, two]


def opens(run_dir: Path) -> bool:
    """Whether `run.json` is taken. Raises AssertionError unless it is refused in one line that names it."""
    taken = []
    for look in (
        lambda: check_format(run_dir),
        lambda: RunDirectory(run_dir, run_id=None),
        lambda: read_info(LocalBlobs(run_dir), "s3://bucket/run"),
    ):
        try:
            look()
        except ElasticError as error:
            text = str(error)
            assert "\n" not in text
            assert RUN_NAME in text or "format version" in text
            taken.append(False)
        else:
            taken.append(True)
    assert len(set(taken)) == 1, taken
    return taken[0]


def test_in_run_json(run_dir: Path) -> None:
    """It has no seal (people may read and mend it): a flip inside a text makes another text."""
    run_dir.mkdir()
    path = run_dir / RUN_NAME
    path.write_bytes(new_info("a-run", ["python", "train.py"]))
    assert opens(run_dir)
    for _ in flips(path):
        opens(run_dir)
    for hostile in (
        b"",
        b"{}",
        b"[" * 60_000,
        b'{"x":' + b"[" * 60_000,
        b"\xff\xfe",
        b'{"run_id":1}',
        b"9" * 60_000,
        b" " * 70_000,
    ):
        path.write_bytes(hostile)
        assert not opens(run_dir), hostile[:8]


@pytest.mark.long
def test_in_packs_larger_than_what_is_read_at_once(run_dir: Path) -> None:
    """A sample of each: the header, every chunk's first and last byte, and a few at random."""
    rng = random.Random(5)
    state = {"big": torch.arange(25 << 20, dtype=torch.int32), "small": torch.ones(3)}
    with CheckpointManager(run_dir) as manager:
        assert manager.save(1, state).wait(WAIT_S).committed
        entry = manager.entries()[0]
        for path in packs(run_dir):
            nbytes = path.stat().st_size
            head = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            edges = [at + by for at in range(head, nbytes, limits.CHUNK_BYTES) for by in (-1, 0)]
            places = {0, 7, 8, nbytes - 1, *edges, *(rng.randrange(nbytes) for _ in range(8))}
            with path.open("r+b") as file:
                for at in sorted(places):
                    file.seek(at)
                    sound = file.read(1)
                    file.seek(at)
                    file.write(bytes([sound[0] ^ 1 << at % 8]))
                    file.flush()
                    problems = manager.verify(entry)
                    assert problems, at
                    assert path.name in problems[0].file
                    with pytest.raises(CorruptSnapshot, match=path.name):
                        manager.load(
                            {"big": torch.empty(25 << 20, dtype=torch.int32), "small": torch.ones(3)}
                        )
                    file.seek(at)
                    file.write(sound)
        assert manager.verify(entry) == []
    assert max(path.stat().st_size for path in packs(run_dir)) > 64 << 20
