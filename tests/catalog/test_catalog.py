"""Names, tags, differences and rollback, on real snapshots."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest
import torch

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import rollback
from autoglm_elastic.catalog.diff import Difference, diff
from autoglm_elastic.catalog.index import Catalog, facts
from autoglm_elastic.catalog.inventory import Inventory
from autoglm_elastic.catalog.tags import Tags
from autoglm_elastic.core.lineage import entry_name
from autoglm_elastic.core.recovery import plan
from autoglm_elastic.errors import CorruptSnapshot, ElasticError, UsageError
from autoglm_elastic.storage import LocalBlobs

from .saved import load, names, record, save, state


def opened(run_dir: Path) -> tuple[LocalBlobs, Catalog, Inventory]:
    blobs = LocalBlobs(run_dir)
    catalog = Catalog(blobs)
    return blobs, catalog, Inventory(blobs, catalog)


def found(run_dir: Path, text: str) -> str:
    return opened(run_dir)[2].find(text).name


def tag(run_dir: Path, name: str, entry: str) -> str | None:
    blobs, catalog, _ = opened(run_dir)
    return Tags(blobs).put(name, entry, catalog, lambda: 5.0)


def test_every_name_that_a_person_may_use(run_dir: Path) -> None:
    one, two = save(run_dir, 1, 2, generation=1)
    (three,) = save(run_dir, 3, generation=1, tags=("given",))
    record(run_dir, 1)
    assert tag(run_dir, "good", one) is None
    assert [found(run_dir, text) for text in ("HEAD", "latest", "2", two, "good", "given", "1")] == [
        three, three, two, two, one, three, one,
    ]  # fmt: skip
    assert tag(run_dir, "good", two) == one
    assert found(run_dir, "good") == two


@pytest.mark.parametrize(
    "name", ["HEAD", "latest", "", "7", "7-g1", "a/b", "../x", "a b", ".a", "-a", "x" * 65, "é"]
)
def test_what_cannot_be_a_tag(run_dir: Path, name: str) -> None:
    (entry,) = save(run_dir, 1)
    with pytest.raises(UsageError, match="valid: a letter"):
        tag(run_dir, name, entry)


def test_a_step_of_two_generations_is_the_one_of_the_lineage_or_ambiguous(run_dir: Path) -> None:
    save(run_dir, 5, generation=1)
    save(run_dir, 5, generation=2)
    with pytest.raises(UsageError, match="ambiguous; valid: 000000000005-g1, 000000000005-g2"):
        found(run_dir, "5")
    record(run_dir, 1)
    record(run_dir, 2, parent=1, step=4)
    assert found(run_dir, "5") == "000000000005-g2"


@pytest.mark.parametrize("text", ["nothing", "99", "000000000099-g1", "../../etc", "\0"])
def test_an_unknown_name_is_one_clear_error(run_dir: Path, text: str) -> None:
    save(run_dir, 1)
    with pytest.raises(UsageError, match="no snapshot"):
        found(run_dir, text)


def test_a_damaged_tag_stops_whoever_needs_to_know_all(run_dir: Path) -> None:
    (entry,) = save(run_dir, 1)
    tag(run_dir, "good", entry)
    path = run_dir / "tags" / "good.json"
    path.write_bytes(path.read_bytes().replace(b"good", b"evil"))
    with pytest.raises(CorruptSnapshot, match=r"tags/good\.json"):
        Tags(LocalBlobs(run_dir)).all()


def compare(run_dir: Path, before: str, after: str) -> Difference:
    blobs, catalog, inventory = opened(run_dir)
    one, other = inventory.find(before), inventory.find(after)
    return diff(blobs, (one.name, other.name), catalog.manifest(one), catalog.manifest(other))


def test_a_difference_names_tensors_and_values(run_dir: Path) -> None:
    save(run_dir, 1)
    other = state(2)
    other["model"] |= {
        "frozen": torch.ones(8),
        "extra": torch.ones(1),
    }
    other["list"] = [1, {"a": float("nan")}]
    del other["lr"]
    save(run_dir, 2, whole=other)
    told = compare(run_dir, "1", "2")
    assert {(change.name, change.what) for change in told.tensors} == {
        ("model.weight", "bytes"),
        ("model.frozen", "dtype"),
        ("model.extra", "added"),
    }
    assert next(c for c in told.tensors if c.what == "bytes").bytes_changed == 96
    assert {(value.path, value.what) for value in told.values} == {
        ("lr", "removed"),
        ("step", "changed"),
        ("list.0", "added"),
        ("list.1.a", "added"),
    }
    assert told.same == 0
    same = compare(run_dir, "1", "1")
    assert (same.tensors, same.values, same.same) == ((), (), 2)


def test_rolling_back_moves_what_a_start_resumes_from_and_can_be_undone(run_dir: Path) -> None:
    one, two, three = save(run_dir, 1, 2, 3, generation=1)
    record(run_dir, 1)
    _, catalog, _ = opened(run_dir)
    made = rollback.roll_back(catalog, one)
    assert (made.number, made.parent, made.resumed_step, made.resumed_entry) == (2, 1, 1, one)
    assert (run_dir / "HEAD").read_text().strip() == one
    assert opened(run_dir)[2].line == [one]
    planned = plan(2, [], facts(catalog.entries()), catalog.records(), live_shards=False)
    assert planned.entries == (one,)
    assert names(run_dir) == [one, two, three], "nothing is deleted"

    record(run_dir, 3, parent=1, step=1, entry=one)  # a start resumed from it …
    (four,) = save(run_dir, 2, generation=3)  # … and went on
    assert opened(run_dir)[2].line == [four, one]
    rollback.roll_back(catalog, three)
    assert opened(run_dir)[2].line == [three, two, one]
    assert load(run_dir)["step"] == 3


def test_rolling_back_a_directory_without_generations(run_dir: Path) -> None:
    one, _ = save(run_dir, 1, 2)
    _, catalog, _ = opened(run_dir)
    rollback.roll_back(catalog, one)
    assert opened(run_dir)[2].line == [one]
    with pytest.raises(UsageError, match="is HEAD"):
        rollback.roll_back(catalog, one)


def test_a_snapshot_that_no_generation_vouches_for_is_refused(run_dir: Path) -> None:
    save(run_dir, 9, generation=7)
    save(run_dir, 1, generation=1)
    record(run_dir, 1)
    with pytest.raises(ElasticError, match="of which there is no record"):
        rollback.roll_back(opened(run_dir)[1], "000000000009-g7")


class Counting(LocalBlobs):
    """Knows what was read."""

    def __init__(self, root: Path, wait_s: float = 0.0) -> None:
        super().__init__(root)
        self.reads: list[str] = []
        self.wait_s = wait_s

    def read(self, name: str, *, bytes_max: int) -> bytes:
        self.reads.append(name)
        threading.Event().wait(self.wait_s)  # a round trip
        return super().read(name, bytes_max=bytes_max)


def copies(run_dir: Path, count: int) -> list[str]:
    """As many entries, all with the packs of one snapshot."""
    (first,) = save(run_dir, 1)
    record(run_dir, 0)
    entry = Catalog(LocalBlobs(run_dir)).entry(first)
    for step in range(2, count + 1):
        name = entry_name(step, 0)
        sealed = fmt.sealed(msgspec.structs.replace(entry, name=name, step=step))
        (run_dir / fmt.entry_path(name)).write_bytes(fmt.encode(sealed))
    return names(run_dir)


def test_the_newest_is_found_without_reading_the_others(run_dir: Path) -> None:
    every = copies(run_dir, 20)
    seen: list[str] = []
    blobs = Counting(run_dir)
    catalog = Catalog(blobs, lambda _, fields: seen.append(fields["entry"]))
    for name in every[-2:]:
        (run_dir / fmt.entry_path(name)).write_bytes(b"{}")
    for _ in range(3):
        newest = catalog.newest()
        assert newest is not None
        assert newest.name == every[-3]
    assert {*blobs.reads} == {"generations/0.json", *map(fmt.entry_path, every[-3:])}
    assert newest == catalog.candidates()[0]
    assert seen == every[:-3:-1], "each once"
    (run_dir / fmt.entry_path(every[-1])).write_bytes(b"[]")
    assert catalog.newest() == newest
    assert seen[2:] == [every[-1]], "another damage is told"


@pytest.mark.parametrize("wait_s", [0.0, 0.004], ids=["near", "far"])
def test_entries_are_read_once_and_as_they_are(run_dir: Path, wait_s: float) -> None:
    every = copies(run_dir, 60)
    blobs = Counting(run_dir, wait_s)
    catalog = Catalog(blobs)
    first = catalog.entries()
    assert [entry.name for entry in first] == every
    assert sorted(blobs.reads) == sorted(map(fmt.entry_path, every))
    blobs.reads.clear()
    assert catalog.entries() == first
    assert blobs.reads == []
    path, again = run_dir / fmt.entry_path(every[3]), fmt.entry_path(every[3])
    aside = path.read_bytes()
    path.unlink()
    assert [entry.name for entry in catalog.entries()] == every[:3] + every[4:]
    other = fmt.sealed(msgspec.structs.replace(first[3], wall_time=first[3].wall_time + 1))
    path.write_bytes(fmt.encode(other))  # a snapshot of the same step, after the first was removed
    assert catalog.entries()[3] == other
    path.write_bytes(aside)
    assert catalog.entries() == first
    assert blobs.reads == [again, again]
    path.write_bytes(aside[:-1])
    assert len(catalog.entries()) == 59
    (run_dir / "generations" / "0.json").write_bytes(b"{}")
    with pytest.raises(CorruptSnapshot):
        catalog.candidates()
