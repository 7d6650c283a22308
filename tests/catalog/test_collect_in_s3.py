"""Garbage collection in a bucket, also one that keeps no versions: a removal there cannot be tied to an object's age,
so nobody may ever need a name again that was found old."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from object_store import Bucket

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.collect import Collected, Collector
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.verify import verify
from autoglm_elastic.core.commit import Verdict
from autoglm_elastic.core.retention import Retention
from autoglm_elastic.snapshot import CheckpointManager
from autoglm_elastic.storage.s3 import S3Blobs
from tests.keeper.saving import WALL, decided, written
from tests.keeper.state import Share

from .saved import WAIT_S, save

DAY_S = 86_400.0
SAME = {"weight": torch.ones(5000), "frozen": torch.zeros(300), "rate": 0.1}


class Aged(S3Blobs):
    """What was there at `age_all` is a day older than the server says, and its clock is ahead by `by_s`. `meanwhile`
    happens between the look at an object and its removal."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket.name, "run", {})
        self.old: set[str] = set()
        self.by_s = 0.0
        self.meanwhile: Callable[[str], object] = lambda name: None
        self.removed: list[str] = []

    def age_all(self) -> None:
        self.old = {name for folder in (fmt.PACK_DIR, fmt.MANIFEST_DIR) for name in self.list(folder)}

    def now(self) -> float:
        return super().now() + self.by_s

    def ages(self, prefix: str) -> dict[str, float]:
        return {name: age + DAY_S * (name in self.old) for name, age in super().ages(prefix).items()}

    def _age(self, name: str, head: Mapping[str, Any]) -> float:
        self.meanwhile(name)
        return super()._age(name, head) + DAY_S * (name in self.old)

    def delete_older(self, name: str, older_s: float) -> int:
        nbytes = super().delete_older(name, older_s)
        if nbytes >= 0:
            self.removed.append(name)
        return nbytes


def collect(blobs: Aged) -> Collected:
    policy = Retention(keep_last=1, keep_abandoned_hours=0)
    done = Collector(blobs, policy, grace_s=0, age_s=limits.PREPARE_S_MAX, wall=lambda: WALL).run()
    assert done.blocked == ""
    return done


def packs_of(blobs: S3Blobs) -> list[set[str]]:
    """Of each entry, of which every byte must verify."""
    catalog = Catalog(blobs)
    found = []
    for entry in catalog.entries():
        assert verify(blobs, catalog, entry) == []
        found.append({fmt.pack_path(pack.sha256) for pack in catalog.manifest(entry).packs})
    return found


@pytest.mark.parametrize("versioning", [True, False], ids=["versions", "no versions"])
def test_what_is_given_up_goes_while_the_same_is_saved_again(bucket: Bucket, versioning: bool) -> None:
    """Between every look at an object and its removal the very same state is saved."""
    if versioning:
        bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    blobs = Aged(bucket)
    with CheckpointManager(bucket.url) as manager:
        step = 0

        def save_again(name: str) -> None:
            nonlocal step
            step += 1
            result = manager.save(step, SAME).wait(WAIT_S)
            assert result.committed, f"{result.reason}, while {name} is removed"

        for name in ("one", "two", "three"):
            save_again(name)
        before = packs_of(blobs)
        blobs.age_all()
        blobs.meanwhile = save_again
        done = collect(blobs)
        assert (len(done.retired), done.packs, done.manifests) == (2, 2, 2)
        assert step == 3 + 4
        after = packs_of(blobs)
    assert len(after) == 1 + 4
    assert not set(blobs.removed) & set().union(*after)
    assert set(blobs.removed) > set().union(*before[:2])
    blobs.age_all()
    blobs.meanwhile = lambda name: None
    assert collect(blobs).packs == 4
    (kept,) = packs_of(blobs)
    assert set(blobs.list(fmt.PACK_DIR)) == kept


def test_who_was_stopped_until_his_packs_were_gone_commits_nothing(bucket: Bucket) -> None:
    blobs, share = Aged(bucket), Share()
    assert decided(blobs, share, 1, written(blobs, share, 1))[0] is Verdict.COMMIT
    result = written(blobs, share, 2)

    def stop(point: str) -> None:
        if point == "entry_due":
            blobs.by_s = DAY_S
            blobs.age_all()
            assert collect(blobs).packs == len(result.packs)

    verdict, reason = decided(blobs, share, 2, result, stop)
    assert verdict is Verdict.UNKNOWN
    assert "too long ago" in reason
    assert Catalog(blobs).names() == ["000000000001-g0"]
    assert len(packs_of(blobs)) == 1


def test_a_manifest_without_packs_has_a_name_of_its_own(run_dir: Path) -> None:
    """Taken twice at one step, as after a collection: the older manifest may be about to be removed."""
    (name,) = save(run_dir, 1, whole={"rate": 0.5})
    (run_dir / fmt.entry_path(name)).unlink()
    assert save(run_dir, 1, whole={"rate": 0.5}) == [name]
    assert len(list((run_dir / fmt.MANIFEST_DIR).iterdir())) == 2
