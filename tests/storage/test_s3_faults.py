"""S3 under faults: lost answers, failing servers, servers that ignore conditions, writers that die."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from object_store import Bucket, Fault, Proxy, Request, moto_server

from autoglm_elastic.errors import CorruptSnapshot, PlatformError, UsageError
from autoglm_elastic.ports import AgingBlobs, Outcome
from autoglm_elastic.storage import _s3_client, open_blobs
from autoglm_elastic.storage._s3_upload import UPLOADS_MAX
from autoglm_elastic.storage.s3 import S3Blobs

PART_BYTES = 5 << 20


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_s3_client, "ATTEMPTS", 2)
    _s3_client._connect.cache_clear()


@pytest.fixture
def blobs(bucket: Bucket, proxy: Proxy) -> S3Blobs:
    """Through the proxy; found to be writable, so that what follows are the test's own requests."""
    blobs = S3Blobs(bucket.name, "run", {}, part_bytes=PART_BYTES)
    blobs.check_writable()
    proxy.requests.clear()
    return blobs


def puts_of(name: str) -> Callable[[Request], bool]:
    return lambda request: request.method == "PUT" and request.path.split("?")[0].endswith(name)


def methods(proxy: Proxy) -> list[str]:
    return [request.method for request in proxy.requests]


# Conditional writes.


@pytest.mark.parametrize("answer", [500, 503, 0], ids=["500", "503", "connection cut"])
def test_our_own_write_whose_answer_was_lost_is_no_conflict(
    blobs: S3Blobs, proxy: Proxy, answer: int
) -> None:
    """The classic trap: the write took effect, its answer was lost, the repetition meets it."""
    proxy.faults = [Fault(puts_of("entry"), answer=answer)]
    assert blobs.put_if_absent("catalog/entry", b"ours") is Outcome.OK
    assert methods(proxy) == ["PUT", "HEAD"]
    assert blobs.put_if_absent("catalog/entry", b"ours") is Outcome.CONFLICT


@pytest.mark.parametrize("answer", [500, 503, 0], ids=["500", "503", "connection cut"])
def test_a_write_that_did_not_arrive_is_repeated(blobs: S3Blobs, proxy: Proxy, answer: int) -> None:
    proxy.faults = [Fault(puts_of("entry"), forward=False, answer=answer)]
    assert blobs.put_if_absent("catalog/entry", b"ours") is Outcome.OK
    assert methods(proxy) == ["PUT", "HEAD", "PUT"]


def test_a_foreign_write_behind_a_lost_answer_is_a_conflict(
    bucket: Bucket, blobs: S3Blobs, proxy: Proxy
) -> None:
    bucket.client.put_object(Bucket=bucket.name, Key="run/catalog/entry", Body=b"theirs")
    proxy.faults = [Fault(puts_of("entry"), answer=500)]
    assert blobs.put_if_absent("catalog/entry", b"ours") is Outcome.CONFLICT
    assert blobs.read("catalog/entry", bytes_max=9) == b"theirs"


def test_what_nobody_can_tell_is_unknown(blobs: S3Blobs, proxy: Proxy) -> None:
    """The server fails from the write on; when it is back, reading settles it."""
    proxy.faults = [Fault(puts_of("entry"), answer=500), Fault(lambda _: True, times=99, answer=503)]
    assert blobs.put_if_absent("catalog/entry", b"ours") is Outcome.UNKNOWN
    proxy.faults = []
    assert blobs.read("catalog/entry", bytes_max=9) == b"ours"


def test_a_server_that_keeps_losing_writes_is_unknown_in_the_end(blobs: S3Blobs, proxy: Proxy) -> None:
    proxy.faults = [Fault(puts_of("entry"), times=99, forward=False, answer=500)]
    assert blobs.put_if_absent("catalog/entry", b"ours") is Outcome.UNKNOWN
    assert blobs.list("catalog") == []


def test_a_refused_write_is_one_line(blobs: S3Blobs, proxy: Proxy) -> None:
    proxy.faults = [Fault(puts_of("entry"), forward=False, answer=403)]
    with pytest.raises(
        PlatformError, match=r"^creating s3://.*AccessDenied.*check the credentials"
    ) as caught:
        blobs.put_if_absent("catalog/entry", b"ours")
    assert "\n" not in str(caught.value)


def test_of_four_processes_one_wins(bucket: Bucket) -> None:
    code = (
        "import sys; from autoglm_elastic.storage import open_blobs\n"
        "blobs = open_blobs(sys.argv[1], for_writing=True); print('ready', flush=True); sys.stdin.read(1)\n"
        "print(blobs.put_if_absent('catalog/entry', sys.argv[2].encode()).name, 'torch' in sys.modules)\n"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, bucket.url, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda racer: racer.communicate("g", timeout=60)[0].split(), racers))
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate(timeout=60)
    assert sorted(answers) == [["CONFLICT", "False"]] * 3 + [["OK", "False"]]
    winner = next(number for number, answer in enumerate(answers) if answer[0] == "OK")
    assert open_blobs(bucket.url).read("catalog/entry", bytes_max=9) == b"%d" % winner


# Stores that cannot be written.


def test_a_server_that_ignores_conditions_is_refused(bucket: Bucket, proxy: Proxy) -> None:
    proxy.faults = [Fault(lambda request: request.method == "PUT", times=99, strip="if-none-match")]
    with pytest.raises(PlatformError, match="ignores conditional writes") as caught:
        open_blobs(bucket.url, for_writing=True)
    assert "\n" not in str(caught.value)
    blobs = open_blobs(bucket.url)
    for write in (blobs.create, lambda: blobs.replace("HEAD", b""), lambda: blobs.put_if_absent("a", b"")):
        with pytest.raises(PlatformError, match="ignores conditional writes"):
            write()
    assert bucket.objects() == []


def test_a_server_without_conditions_is_refused(bucket: Bucket, proxy: Proxy) -> None:
    proxy.faults = [Fault(lambda request: "if-none-match" in request.headers, times=99, answer=501)]
    with pytest.raises(PlatformError, match="NotImplemented"):
        open_blobs(bucket.url, for_writing=True)


def test_the_trial_is_once_per_process(bucket: Bucket, proxy: Proxy) -> None:
    open_blobs(bucket.url, for_writing=True)
    assert bucket.objects() == []
    proxy.requests.clear()
    open_blobs(f"s3://{bucket.name}/other", for_writing=True)
    assert proxy.requests == []


def test_a_missing_bucket_is_one_line(bucket: Bucket) -> None:
    with pytest.raises(PlatformError, match=r"NoSuchBucket.*create the bucket"):
        open_blobs("s3://no-such-bucket-here", for_writing=True)
    with pytest.raises(PlatformError, match=r"NoSuchBucket.*create the bucket"):
        open_blobs("s3://no-such-bucket-here").list("catalog")


def test_a_server_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, bucket: Bucket) -> None:
    with moto_server() as (endpoint, _):
        pass
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(PlatformError, match="check the network and the endpoint") as caught:
        open_blobs(bucket.url, for_writing=True)
    assert "\n" not in str(caught.value)


# Uploads.


def upload(blobs: S3Blobs, data: bytes, name: str = "packs/x") -> None:
    pending = blobs.create()
    pending.write(data)
    pending.publish(name)


def test_a_large_blob_is_copied_in_parts(
    monkeypatch: pytest.MonkeyPatch, bucket: Bucket, blobs: S3Blobs
) -> None:
    monkeypatch.setattr("autoglm_elastic.storage._s3_upload.COPY_BYTES_MIN", PART_BYTES)
    data = bytes(range(256)) * (12 << 12)
    upload(blobs, data)
    assert bucket.objects() == ["run/packs/x"]
    assert bucket.uploads() == []
    assert blobs.read("packs/x", bytes_max=len(data)) == data


def asks(method: str, path: str) -> Callable[[Request], bool]:
    """Chooses requests by method and a pattern in their path."""
    return lambda request: request.method == method and re.search(path, request.path) is not None


BEGIN = asks("POST", r"tmp/[0-9a-f]+\?uploads")
FIRST_PART = asks("PUT", r"partNumber=1\b")
SECOND_PART = asks("PUT", r"partNumber=2\b")
COMPLETION = asks("POST", r"tmp/[0-9a-f]+\?uploadId")
COPY = asks("PUT", r"packs/x$")


@pytest.mark.parametrize(
    "chosen",
    [BEGIN, FIRST_PART, SECOND_PART, COMPLETION, COPY],
    ids=["begin", "first part", "second part", "completion", "copy"],
)
def test_a_failing_upload_leaves_nothing(
    bucket: Bucket, blobs: S3Blobs, proxy: Proxy, chosen: Callable[[Request], bool]
) -> None:
    proxy.faults = [Fault(chosen, times=99, forward=False, answer=500)]
    with pytest.raises(PlatformError, match="try again later") as caught:
        upload(blobs, bytes(12 << 20))
    assert "\n" not in str(caught.value)
    assert bucket.objects() == bucket.uploads() == []


@pytest.mark.parametrize("answer", [500, 0], ids=["500", "connection cut"])
def test_an_upload_passes_over_single_faults(
    bucket: Bucket, blobs: S3Blobs, proxy: Proxy, answer: int
) -> None:
    """Every kind of request fails once after it took effect: also the completion, which cannot be repeated."""
    data = bytes(range(256)) * (12 << 12)
    proxy.faults = [Fault(chosen, answer=answer) for chosen in (SECOND_PART, COMPLETION, COPY)]
    upload(blobs, data)
    assert all(fault.seen.is_set() for fault in proxy.faults)
    assert bucket.objects() == ["run/packs/x"]
    assert bucket.uploads() == []
    assert blobs.read("packs/x", bytes_max=len(data)) == data


def test_a_server_killed_in_mid_upload_is_one_line(make_bucket: Callable[[str], Bucket]) -> None:
    with moto_server() as (endpoint, process):
        bucket = make_bucket(endpoint)
        blobs = S3Blobs(bucket.name, "run", {}, part_bytes=PART_BYTES)
        pending = blobs.create()
        pending.write(bytes(PART_BYTES))
        process.kill()
        process.wait(timeout=60)

        def go_on() -> None:
            pending.write(bytes(3 * PART_BYTES))
            pending.publish("packs/x")

        with pytest.raises(PlatformError, match="check the network and the endpoint") as caught:
            go_on()
        assert "\n" not in str(caught.value)
        pending.discard()


def test_what_a_killed_writer_leaves_is_invisible_and_swept(bucket: Bucket) -> None:
    code = (
        "import sys; from autoglm_elastic.storage.s3 import S3Blobs\n"
        "blobs = S3Blobs(sys.argv[1], 'run', {}, part_bytes=5 << 20); pending = blobs.create()\n"
        "pending.write(bytes(12 << 20)); pending._parts[1].result(60); print('ready', flush=True); sys.stdin.read(1)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, bucket.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate(timeout=60)
    blobs = S3Blobs(bucket.name, "run", {})
    assert bucket.objects() == []
    assert len(bucket.uploads()) == 1
    bucket.client.put_object(Bucket=bucket.name, Key="run/tmp/left", Body=b"")
    blobs.sweep(3600)  # (moto dates every upload to 2010)
    assert bucket.objects() == ["run/tmp/left"]
    blobs.sweep(-60)
    assert bucket.objects() == bucket.uploads() == []


def between_look_and_removal(
    blobs: S3Blobs, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]
) -> None:
    """From now on `act` happens between a look at an object and its removal."""
    look = blobs._head

    def and_then(name: str) -> dict[str, object]:
        head = look(name)
        act()
        return head

    monkeypatch.setattr(blobs, "_head", and_then)


@pytest.mark.parametrize("versioning", ["Enabled", "Suspended", ""])
def test_what_was_written_over_the_object_that_was_looked_at_stays(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, versioning: str
) -> None:
    blobs = S3Blobs(bucket.name, "run", {})
    if versioning:
        bucket.client.put_bucket_versioning(
            Bucket=bucket.name, VersioningConfiguration={"Status": versioning}
        )
    upload(blobs, b"one")
    assert blobs.delete_older("packs/x", 3600) == -1
    ages = blobs.ages("packs")
    assert ages.keys() == {"packs/x"}
    assert -60 < ages["packs/x"] < 3600
    with monkeypatch.context() as patch:
        between_look_and_removal(blobs, patch, lambda: upload(blobs, b"another"))
        assert blobs.delete_older("packs/x", -60) == (3 if versioning == "Enabled" else -1)
    assert blobs.read("packs/x", bytes_max=7) == b"another"
    with monkeypatch.context() as patch:
        between_look_and_removal(blobs, patch, lambda: blobs.delete("packs/x"))
        assert blobs.delete_older("packs/x", -60) in (-1, 7)
    upload(blobs, b"one")
    assert blobs.delete_older("packs/x", -60) == 3
    assert blobs.list("packs") == []
    assert isinstance(blobs, AgingBlobs)
    assert blobs.delete_older("packs/y", -60) == -1


def test_where_a_condition_of_a_removal_is_not_known_it_is_done_without(
    bucket: Bucket, blobs: S3Blobs, proxy: Proxy
) -> None:
    upload(blobs, b"one")
    removes = lambda request: request.method == "DELETE" and "if-match" in request.headers  # noqa: E731
    proxy.faults = [Fault(removes, forward=False, answer=501)]
    assert blobs.delete_older("packs/x", -60) == 3
    assert proxy.faults[0].seen.is_set()
    upload(blobs, b"one")
    proxy.faults = [Fault(removes, times=9, forward=False, answer=403)]
    with pytest.raises(PlatformError, match="check the credentials"):
        blobs.delete_older("packs/x", -60)
    assert bucket.objects() == ["run/packs/x"]


def test_memory_is_bounded_by_parts_in_flight(
    monkeypatch: pytest.MonkeyPatch, blobs: S3Blobs, proxy: Proxy
) -> None:
    """A writer that is faster than the network waits, and not for ever."""
    monkeypatch.setattr("autoglm_elastic.storage._s3_upload.LIMIT_S", 0.5)
    go_on = threading.Event()

    def held(request: Request) -> bool:
        return "partNumber=" in request.path and not go_on.wait(timeout=60)

    proxy.faults = [Fault(held)]
    pending = blobs.create()
    with pytest.raises(PlatformError, match="did not end within 0 s"):
        pending.write(bytes(8 * PART_BYTES))
    assert len(pending._parts) == UPLOADS_MAX
    go_on.set()
    pending.discard()


# Reading.


def test_a_read_goes_on_where_the_connection_broke(bucket: Bucket, blobs: S3Blobs, proxy: Proxy) -> None:
    data = bytes(range(256)) * (4 << 12)
    bucket.client.put_object(Bucket=bucket.name, Key="run/packs/x", Body=data)
    gets = lambda request: request.method == "GET"  # noqa: E731
    proxy.faults = [Fault(gets, times=2, cut_at=1 << 20), Fault(gets, answer=503)]
    buffer = bytearray(len(data))
    blobs.open("packs/x").read_into(0, memoryview(buffer))
    assert buffer == data
    proxy.faults = [Fault(gets, cut_at=5)]
    assert blobs.read("packs/x", bytes_max=len(data)) == data


def test_a_read_that_keeps_breaking_is_one_line(bucket: Bucket, blobs: S3Blobs, proxy: Proxy) -> None:
    bucket.client.put_object(Bucket=bucket.name, Key="run/packs/x", Body=bytes(1000))
    proxy.faults = [Fault(lambda request: request.method == "GET", times=99, cut_at=1)]
    with pytest.raises(PlatformError, match="the connection broke"):
        blobs.open("packs/x").read_into(0, memoryview(bytearray(1000)))


def test_an_object_that_became_shorter_is_corrupt(bucket: Bucket, blobs: S3Blobs) -> None:
    bucket.client.put_object(Bucket=bucket.name, Key="run/packs/x", Body=bytes(20 << 20))
    reader = blobs.open("packs/x")
    for there in (9 << 20, 10):
        bucket.client.put_object(Bucket=bucket.name, Key="run/packs/x", Body=bytes(there))
        with pytest.raises(CorruptSnapshot, match="became shorter"):
            reader.read_into(0, memoryview(bytearray(20 << 20)))
    with pytest.raises(CorruptSnapshot, match="became shorter"):
        reader.read_into(15 << 20, memoryview(bytearray(10)))
    blobs.delete("packs/x")
    with pytest.raises(FileNotFoundError):
        reader.read_into(0, memoryview(bytearray(10)))


def test_a_server_that_does_not_answer_is_given_up(
    monkeypatch: pytest.MonkeyPatch, bucket: Bucket, proxy: Proxy
) -> None:
    monkeypatch.setattr(_s3_client, "READ_S", 0.5)
    blobs = open_blobs(bucket.url)
    over = threading.Event()

    def hang(_: Request) -> bool:
        over.wait(timeout=60)
        return False

    proxy.faults = [Fault(hang)]
    try:
        with pytest.raises(PlatformError, match="check the network and the endpoint"):
            blobs.size("packs/x")
    finally:
        over.set()


def test_a_list_goes_over_pages(bucket: Bucket, blobs: S3Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(25):
        bucket.client.put_object(Bucket=bucket.name, Key=f"run/catalog/{number:03}.json", Body=b"")
    bucket.client.put_object(Bucket=bucket.name, Key="run/catalog/a folder/", Body=b"")
    paginate = blobs.clients.patient.get_paginator

    def small_pages(name: str) -> object:
        pages = paginate(name)
        monkeypatch.setattr(
            pages,
            "paginate",
            lambda of=pages.paginate, **given: of(**given, PaginationConfig={"PageSize": 10}),
        )
        return pages

    monkeypatch.setattr(blobs.clients.patient, "get_paginator", small_pages)
    assert blobs.list("catalog") == [f"catalog/{number:03}.json" for number in range(25)]


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="option 'endpoint'"):
        open_blobs("s3://bucket/run", options={"endpoint": "x"})
    with pytest.raises(UsageError, match="no-such-profile"):
        open_blobs("s3://bucket/run", options={"profile_name": "no-such-profile"}).list("catalog")
