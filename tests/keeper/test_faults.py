"""A disk that fails, memory that is refused, clients that lie: one clear line for the one concerned."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from autoglm_elastic.catalog import failpoints
from autoglm_elastic.core.commit import Snapshot, Verdict
from autoglm_elastic.errors import ElasticError
from autoglm_elastic.keeper import AGENT, InProcess, PackImage, WriteJob, address, messages, open_keeper
from autoglm_elastic.keeper.job import check_layout
from autoglm_elastic.keeper.memory import MemoryRefused
from autoglm_elastic.keeper.writer import Result, Writer
from autoglm_elastic.settings import Keeper as KeeperSettings
from autoglm_elastic.storage import LocalBlobs
from autoglm_elastic.storage.files import Files
from tests.keeper.conftest import NODE, Ensure, Watch
from tests.keeper.state import Share, committed

WAIT_S = 60.0


class Faulty(Files):
    """The first `count` calls of a kind fail."""

    def __init__(self, call: str, count: int, number: int = errno.EIO) -> None:
        self.call, self.left, self.number = call, count, number
        self.lock = threading.Lock()

    def _maybe(self, call: str) -> None:
        with self.lock:
            if call == self.call and self.left > 0:
                self.left -= 1
                raise OSError(self.number, os.strerror(self.number))

    def write(self, fd: int, view: memoryview, offset: int) -> int:
        self._maybe("write")
        return super().write(fd, view, offset)

    def fsync(self, fd: int) -> None:
        self._maybe("fsync")
        super().fsync(fd)

    def rename(self, source: str, target: str) -> None:
        self._maybe("rename")
        super().rename(source, target)


def write(run_dir: Path, files: Files) -> Result:
    share = Share()
    keeper = InProcess(LocalBlobs(run_dir), rank=0)
    segment = keeper.segment(share.nbytes)
    share.fill(segment, 1)
    results: list[Result] = []
    done = threading.Event()
    writer = Writer(LocalBlobs(run_dir, files=files, direct=True), failpoints.none)
    writer.start(segment.memory, tuple(share.images), 0, lambda result: (results.append(result), done.set()))  # type: ignore[func-returns-value]
    assert done.wait(WAIT_S)
    writer.close()
    keeper.close()
    return results[0]


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        ("write", errno.EIO, "Input/output error"),
        ("write", errno.ENOSPC, "No space left"),
        ("rename", errno.EIO, "Input/output error"),
    ],
)
def test_a_failing_disk_fails_the_job_and_leaves_nothing(
    run_dir: Path, call: str, number: int, words: str
) -> None:
    result = write(run_dir, Faulty(call, 1, number))
    assert words in result.reason
    assert "\n" not in result.reason
    assert [path for path in run_dir.rglob("*") if path.is_file()] == []


def test_a_failed_fsync_is_written_anew_once(run_dir: Path) -> None:
    assert write(run_dir, Faulty("fsync", 1)).reason == ""
    assert "fsync" in write(run_dir, Faulty("fsync", 100)).reason


def test_memory_is_refused_in_one_line(ensure: Ensure) -> None:
    keeper = ensure(settings=KeeperSettings(linger_s=0, memory_max_bytes=1 << 20))
    kept = keeper.segment(1 << 19)
    with pytest.raises(MemoryRefused, match="memory_max_bytes is 1048576") as refused:
        keeper.segment(1 << 20)
    assert "\n" not in str(refused.value)
    keeper.give_back(kept)
    assert keeper.segment(1 << 20).nbytes == 1 << 20  # the smaller one made room


def test_more_than_the_machine_has_is_refused(ensure: Ensure) -> None:
    with pytest.raises(MemoryRefused, match="to spare"):
        ensure().segment(1 << 41)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        b"\x05\x00\x00\x00" + bytes(8) + b"{]}{[",
        messages.frame(messages.Allocate(1, 4096)),
        messages.frame(messages.Hello(99, "other", "elsewhere", 0)),
    ],
    ids=["oversize", "no-json", "before-hello", "other-version"],
)
def test_a_client_that_lies_loses_its_connection_only(
    ensure: Ensure, watch: Watch, run_dir: Path, data: bytes
) -> None:
    keeper = ensure()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hostile:
        hostile.settimeout(WAIT_S)
        hostile.connect(watch.socket)
        hostile.sendall(data)
        heard = messages.Frames()
        while received := hostile.recv(1 << 16):
            heard.feed(received)
        frame = heard.next()
        assert frame is not None
        assert isinstance(messages.REPLIES.decode(frame[0]), messages.Refused)
    Share().save(keeper, Snapshot(1, 1)).wait(WAIT_S)
    keeper.settled(Snapshot(1, 1), Verdict.UNKNOWN)
    assert keeper.settle(WAIT_S)
    assert committed(run_dir) == [1]


def test_images_stay_inside_their_segment() -> None:
    good = PackImage(0, 4096, 64, ((4096, 10),), 4106)
    check_layout((good,), 8192)
    for wrong in (
        PackImage(4096, 4096, 64, ((4096, 10),), 4106),
        PackImage(1, 4096, 64, ((4096, 10),), 4106),
        PackImage(-4096, 4096, 64, ((4096, 10),), 4106),
        PackImage(0, 4096, 64, ((4096, 11),), 4106),
        PackImage(0, 4096, 64, ((4097, 9),), 4106),
        PackImage(0, 4096, 4090, ((4096, 10),), 4106),
    ):
        with pytest.raises(ElasticError, match="image 0"):
            check_layout((wrong,), 8192)


def test_a_job_outside_its_segment_is_refused_here(ensure: Ensure) -> None:
    keeper = ensure()
    share = Share()
    small = keeper.segment(4096)
    job = WriteJob(
        Snapshot(1, 1), small.number, tuple(share.images), share.vote, share.details(Snapshot(1, 1))
    )
    with pytest.raises(ElasticError, match="image"):
        keeper.write(job).wait(WAIT_S)
    assert not keeper.gone


def test_a_keeper_waits_for_a_killed_agent_and_is_found_again(ensure: Ensure, run_dir: Path) -> None:
    settings = KeeperSettings(linger_s=60)
    agent = ensure(rank=AGENT, settings=settings)
    pid = agent.pid
    agent._lose("as if this process were killed")
    again = ensure(rank=AGENT, settings=settings)
    assert again.pid == pid
    again.close()  # in good order: it does not linger


def test_another_version_is_another_keeper(run_dir: Path) -> None:
    ours = address.socket_path(str(run_dir), NODE)
    other = address.socket_path(str(run_dir), NODE, version_="other")
    assert ours != other
    assert address.socket_path(f"{run_dir}2", NODE) != ours


def test_a_stopped_keeper_costs_a_bounded_wait(ensure: Ensure) -> None:
    keeper = ensure()
    share = Share()
    segment = keeper.segment(share.nbytes)
    share.fill(segment, 1)
    os.kill(keeper.pid, signal.SIGSTOP)
    try:
        assert not keeper.settle(0.05)
        pending = keeper.write(share.job(Snapshot(1, 1), segment))
        with pytest.raises(ElasticError, match="not durable within"):
            pending.wait(0.05)
    finally:
        os.kill(keeper.pid, signal.SIGCONT)
    assert pending.wait(WAIT_S)


def test_nobody_waits_for_a_keeper_that_does_not_read(ensure: Ensure) -> None:
    """More is told to it than fits into the socket: all of it arrives when it goes on."""
    keeper = ensure()
    share = Share()
    segment = keeper.segment(share.nbytes)
    share.fill(segment, 1)
    job = share.job(Snapshot(1, 1), segment)
    os.kill(keeper.pid, signal.SIGSTOP)
    try:
        pending = keeper.write(dataclasses.replace(job, details=b" " * (8 << 20) + job.details))
        keeper.enter(rank=0, world_size=1, generation=2)
        keeper.settled(Snapshot(9, 9), Verdict.ABORT)
        assert keeper.take(share.nbytes) is None
        with pytest.raises(ElasticError, match="did not answer within"):
            keeper._ask(messages.Settle(77), messages.Settled, 77, 0.05)
        assert not pending.done()
    finally:
        os.kill(keeper.pid, signal.SIGCONT)
    assert pending.wait(WAIT_S)
    assert keeper.settle(WAIT_S)


def test_where_no_keeper_can_be_had_the_rank_writes(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_dir.parent / ("long" * 30)))
    os.makedirs(os.environ["XDG_RUNTIME_DIR"])
    told: list[str] = []
    keeper = open_keeper(
        str(run_dir), LocalBlobs(run_dir), rank=0, on_told=lambda name, fields: told.append(name)
    )
    assert isinstance(keeper, InProcess)
    assert told == ["keeper.missing"]
    segment = keeper.segment(Share().nbytes)
    Share().fill(segment, 1)
    keeper.write(Share().job(Snapshot(1, 1), segment)).wait(WAIT_S)
    keeper.settled(Snapshot(1, 1), Verdict.UNKNOWN)
    assert keeper.settle(WAIT_S)
    keeper.close()
    assert committed(run_dir) == [1]
