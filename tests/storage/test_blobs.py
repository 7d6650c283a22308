"""What every writable ports.StreamBlobs promises, asked of each: a directory, memory, an S3 server."""

from __future__ import annotations

import random
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autoglm_elastic.errors import CorruptSnapshot, UsageError
from autoglm_elastic.ports import Outcome, StreamBlobs
from autoglm_elastic.storage import open_blobs
from autoglm_elastic.storage.s3 import S3Blobs

PART_BYTES = 5 << 20


@pytest.fixture(params=["local", "file", "memory", "s3", "s3 in parts"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> StreamBlobs:
    if request.param == "local":
        return open_blobs(tmp_path / "root", for_writing=True)
    if request.param == "file":
        return open_blobs(f"file://{tmp_path}/blobs", for_writing=True)
    if request.param == "memory":
        return open_blobs(f"memory://{uuid.uuid4().hex}/blobs", for_writing=True)
    bucket = request.getfixturevalue("bucket")
    if request.param == "s3":
        return open_blobs(bucket.url, for_writing=True)
    return S3Blobs(bucket.name, "run", {}, part_bytes=PART_BYTES)


def data(nbytes: int) -> bytes:
    """Bytes of which no two ranges are alike."""
    return random.Random(nbytes).randbytes(nbytes)


def test_what_is_put_is_read(blobs: StreamBlobs) -> None:
    assert blobs.put_if_absent("a/b/c", b"123456") is Outcome.OK
    assert blobs.read("a/b/c", bytes_max=6) == b"123456"
    assert blobs.read_range("a/b/c", 2, 3) == b"345"
    assert blobs.read_range("a/b/c", 6, 0) == b""
    assert blobs.size("a/b/c") == 6
    assert blobs.list("a") == ["a/b/c"]
    assert blobs.list("tmp") == []


def test_a_blob_can_be_empty(blobs: StreamBlobs) -> None:
    blobs.put_if_absent("a", b"")
    blobs.create().publish("packs/b")
    for name in ("a", "packs/b"):
        assert blobs.read(name, bytes_max=0) == b""
        assert blobs.read_range(name, 0, 0) == b""
        blobs.open(name).read_into(0, memoryview(bytearray()))


def test_a_second_put_is_a_conflict_and_changes_nothing(blobs: StreamBlobs) -> None:
    blobs.put_if_absent("a", b"first")
    assert blobs.put_if_absent("a", b"second") is Outcome.CONFLICT
    assert blobs.put_if_absent("a", b"first") is Outcome.CONFLICT
    assert blobs.read("a", bytes_max=9) == b"first"


def test_of_twelve_at_once_one_wins(blobs: StreamBlobs) -> None:
    start = threading.Barrier(12)

    def put(number: int) -> Outcome:
        start.wait(timeout=60)
        return blobs.put_if_absent("catalog/entry", b"%d" % number)

    with ThreadPoolExecutor(12) as pool:
        outcomes = list(pool.map(put, range(12), timeout=60))
    assert sorted(outcomes, key=lambda outcome: outcome.value) == [Outcome.CONFLICT] * 11 + [Outcome.OK]
    assert blobs.read("catalog/entry", bytes_max=9) == b"%d" % outcomes.index(Outcome.OK)


def test_replace_is_last_wins(blobs: StreamBlobs) -> None:
    blobs.replace("HEAD", b"1")
    blobs.replace("HEAD", b"22")
    assert blobs.read("HEAD", bytes_max=2) == b"22"
    blobs.point("latest", "catalog/2")


@pytest.mark.parametrize("nbytes", [4, PART_BYTES, 2 * PART_BYTES + 11])
def test_a_streamed_blob_is_invisible_until_published(blobs: StreamBlobs, nbytes: int) -> None:
    whole = data(nbytes)
    pending = blobs.create()
    buffer = bytearray(whole[: nbytes // 3])
    pending.write(memoryview(buffer))
    buffer[:] = bytes(len(buffer))  # the caller may use its memory again
    pending.write(whole[nbytes // 3 :])
    assert blobs.list("packs") == []
    pending.publish("packs/x")
    pending.discard()
    assert blobs.list("packs") == ["packs/x"]
    assert blobs.read("packs/x", bytes_max=nbytes) == whole
    assert blobs.list("tmp") == []


@pytest.mark.parametrize("head", [3, PART_BYTES + 7])
@pytest.mark.parametrize("nbytes", [0, 5, PART_BYTES - 3, 2 * PART_BYTES + 11])
def test_a_head_may_come_last(blobs: StreamBlobs, head: int, nbytes: int) -> None:
    whole = data(head + nbytes)
    pending = blobs.create(head=head)
    pending.write(whole[head:])
    with pytest.raises(UsageError, match="a head of 1 bytes"):
        pending.publish("packs/x", b"1")
    pending.publish("packs/x", whole[:head])
    assert blobs.read("packs/x", bytes_max=len(whole)) == whole
    assert blobs.list("tmp") == []


def test_a_discarded_blob_leaves_nothing(blobs: StreamBlobs) -> None:
    pending = blobs.create()
    pending.write(data(2 * PART_BYTES))
    pending.discard()
    pending.discard()
    assert blobs.list("packs") == blobs.list("tmp") == []


def test_publishing_a_content_again_keeps_it(blobs: StreamBlobs) -> None:
    for _ in range(2):
        pending = blobs.create()
        pending.write(b"same")
        pending.publish("packs/ab/same")
    assert blobs.read("packs/ab/same", bytes_max=4) == b"same"


def test_ranges_are_read_from_several_threads(blobs: StreamBlobs) -> None:
    whole = data(18 << 20)
    pending = blobs.create()
    pending.write(whole)
    pending.publish("packs/x")
    reader = blobs.open("packs/x")
    assert reader.nbytes == len(whole)

    def read(job: tuple[int, int]) -> bool:
        begin, nbytes = job
        buffer = bytearray(nbytes)
        reader.read_into(begin, memoryview(buffer))
        return bytes(buffer) == whole[begin : begin + nbytes]

    jobs = [(0, len(whole)), (1, 17 << 20), (7, 1), (len(whole) - 3, 3), (len(whole), 0), (1 << 20, 9 << 20)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, jobs, timeout=60))
    reader.close()


def test_reading_is_capped_and_bounded(blobs: StreamBlobs) -> None:
    blobs.put_if_absent("a", b"123456")
    with pytest.raises(CorruptSnapshot, match="6 bytes"):
        blobs.read("a", bytes_max=5)
    reader = blobs.open("a")
    for offset, nbytes in ((4, 3), (0, 1 << 50), (-1, 1), (7, 0)):
        with pytest.raises(CorruptSnapshot, match="are wanted"):
            blobs.read_range("a", offset, nbytes)
    with pytest.raises(CorruptSnapshot, match="are wanted"):
        reader.read_into(3, memoryview(bytearray(4)))
    reader.close()


def test_what_is_missing_is_a_file_not_found(blobs: StreamBlobs) -> None:
    blobs.put_if_absent("a/there", b"")
    for call in (
        lambda: blobs.read("a/b", bytes_max=5),
        lambda: blobs.read_range("a/b", 0, 1),
        lambda: blobs.size("a/b"),
        lambda: blobs.open("a/b"),
    ):
        with pytest.raises(FileNotFoundError):
            call()
    assert blobs.list("nowhere") == []


def test_a_deleted_blob_is_gone(blobs: StreamBlobs) -> None:
    blobs.put_if_absent("a/b", b"1")
    blobs.delete("a/b")
    blobs.delete("a/b")
    assert blobs.list("a") == []
    assert blobs.put_if_absent("a/b", b"2") is Outcome.OK


def test_a_list_has_only_what_lies_in_the_folder(blobs: StreamBlobs) -> None:
    for name in ("packs/ab/1", "packs/cd/2", "packs2/ab/3", "packs/0"):
        blobs.put_if_absent(name, b"")
    assert blobs.list("packs") == ["packs/0", "packs/ab/1", "packs/cd/2"]
    assert blobs.list("packs/ab") == ["packs/ab/1"]


def test_names_stay_below_the_root(blobs: StreamBlobs) -> None:
    for name in ("../a", "a/../b", "/a", "a//b", "", ".", "a/.hidden", "a\0b", "a/b/c/d/e", "a b"):
        pending = blobs.create()
        for call in (
            lambda name=name: blobs.read(name, bytes_max=1),
            lambda name=name: blobs.read_range(name, 0, 0),
            lambda name=name: blobs.open(name),
            lambda name=name: blobs.size(name),
            lambda name=name: blobs.put_if_absent(name, b""),
            lambda name=name: blobs.replace(name, b""),
            lambda name=name: blobs.list(name),
            lambda name=name: blobs.delete(name),
            lambda name=name: blobs.point(name, "a"),
            lambda name=name, pending=pending: pending.publish(name),
        ):
            with pytest.raises(UsageError, match="blob name"):
                call()
        pending.discard()
