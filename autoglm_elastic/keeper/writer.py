"""From images in memory to durable files: several in flight, hashed meanwhile, named, or none of it.

Runs in a keeper, and in a rank where no keeper can be had. May write files through `ports.StreamBlobs`; must
never raise into its caller what is a job's failure, and never lose one."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import xxhash

from autoglm_elastic.catalog import packs as pack_format
from autoglm_elastic.catalog.failpoints import Failpoints
from autoglm_elastic.catalog.format import Pack, pack_path
from autoglm_elastic.catalog.removal import remove
from autoglm_elastic.errors import ElasticError, PlatformError
from autoglm_elastic.keeper.job import Layout, PackImage
from autoglm_elastic.keeper.messages import one_line
from autoglm_elastic.ports import AgingBlobs, StreamBlobs
from autoglm_elastic.storage import SyncFailed

FILES_IN_FLIGHT: Final = 4
HASH_THREADS: Final = min(4, os.cpu_count() or 1)
WRITE_ATTEMPTS: Final = 2
"""A pack whose fsync failed is written anew under another name, once."""
HASH_S: Final = 600.0
"""How long a file waits for the digests of its chunks: hashing runs at hundreds of MB/s, at low priority."""
WRITE_BYTES: Final = 16 << 20
"""One write call."""
_HASH_BYTES: Final = 1 << 20
"""Hashed by both functions while it is in the cache; large enough that the interpreter's lock is let go."""
_HASH_GROUP_BYTES: Final = 32 << 20
"""Chunks that one thread hashes in a go."""


class Abandoned(ElasticError):
    """The job was given up: another of its files failed, or the snapshot was aborted."""


@dataclass(frozen=True, slots=True)
class Result:
    """`reason`: "" when every pack is durable. `since`: as in fmt.Prepared."""

    packs: tuple[Pack, ...] = ()
    reason: str = ""
    since: float | None = None

    @property
    def names(self) -> list[str]:
        """Of the files, which nobody else counts on: to take the snapshot back."""
        return [pack_path(pack.sha256) for pack in self.packs]


@dataclass(slots=True)
class Work:
    """One job under way. `stop` gives it up at the next opportunity."""

    view: memoryview
    layout: Layout
    rank: int
    on_done: Callable[[Result], None]
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    left: int = 0
    packs: dict[int, Pack] = field(default_factory=dict)
    reason: str = ""
    since: float | None = None


class Writer:
    """Threads that write and hash for all jobs of a process."""

    def __init__(self, blobs: StreamBlobs, failpoint: Failpoints) -> None:
        self._blobs, self._failpoint = blobs, failpoint
        self._files = ThreadPoolExecutor(FILES_IN_FLIGHT, thread_name_prefix="autoglm-write")
        self._hashers = ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="autoglm-hash")

    def start(self, view: memoryview, layout: Layout, rank: int, on_done: Callable[[Result], None]) -> Work:
        """Returns at once; `on_done` is called once, from a thread of this writer, with nothing left behind
        when the job failed."""
        work = Work(view, layout, rank, on_done, left=len(layout))
        if not layout:
            self._files.submit(on_done, Result())
        for number, image in enumerate(layout):
            self._files.submit(self._one, work, number, image)
        return work

    def close(self) -> None:
        """Ends the threads when their work is done; waits for none of it."""
        self._files.shutdown(wait=False)
        self._hashers.shutdown(wait=False)

    def _one(self, work: Work, number: int, image: PackImage) -> None:
        try:
            self._date(work)
            self._pack(work, number, image)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is this job's failure, told to its rank
            with work.lock:
                if not isinstance(error, Abandoned):
                    work.reason = work.reason or one_line(error)
            work.stop.set()
        with work.lock:
            work.left -= 1
            if work.left:
                return
        if work.stop.is_set():
            remove(self._blobs, (pack_path(pack.sha256) for pack in work.packs.values()))
            work.on_done(Result(reason=work.reason or "the snapshot was given up"))
        else:
            packs = tuple(work.packs[number] for number in range(len(work.layout)))
            work.on_done(Result(packs, since=work.since))

    def _date(self, work: Work) -> None:
        """Before anything of this job is written. Raises ElasticError."""
        with work.lock:
            if work.since is None and isinstance(self._blobs, AgingBlobs):
                work.since = self._blobs.now()

    def _pack(self, work: Work, number: int, image: PackImage) -> None:
        data = work.view[image.start : image.start + image.nbytes]
        hashing = [self._hashers.submit(_digests, data, spans, work.stop) for spans in _groups(image.spans)]
        for attempt in range(1, WRITE_ATTEMPTS + 1):
            try:
                pack = self._write(work, image, data, hashing)
                break
            except SyncFailed:
                if attempt == WRITE_ATTEMPTS:
                    raise
        with work.lock:
            work.packs[number] = pack
        self._failpoint("pack_written")

    def _write(self, work: Work, image: PackImage, data: memoryview, hashing: list[Future[bytes]]) -> Pack:
        """Raises ElasticError; nothing is left behind then."""
        pending = self._blobs.create(head=image.head_nbytes)
        try:
            for begin in range(image.head_nbytes, image.nbytes, WRITE_BYTES):
                if work.stop.is_set():
                    raise Abandoned("given up")
                pending.write(data[begin : min(begin + WRITE_BYTES, image.nbytes)])
            try:
                digests = b"".join([future.result(timeout=HASH_S) for future in hashing])
            except TimeoutError as error:
                raise PlatformError(f"hashing a pack took more than {HASH_S} s") from error
            head, sha256 = pack_format.fill(bytes(data[: image.head_nbytes]), image.digests_at, digests)
        except BaseException:
            pending.discard()
            raise
        try:
            pending.publish(pack_path(sha256), head)
        except BaseException:
            pending.discard()
            remove(self._blobs, [pack_path(sha256)])
            raise
        return Pack(sha256, image.nbytes, image.head_nbytes, work.rank)


def _groups(spans: tuple[tuple[int, int], ...]) -> Iterator[tuple[tuple[int, int], ...]]:
    group: list[tuple[int, int]] = []
    nbytes = 0
    for span in spans:
        group.append(span)
        nbytes += span[1]
        if nbytes >= _HASH_GROUP_BYTES:
            yield tuple(group)
            group, nbytes = [], 0
    if group:
        yield tuple(group)


def _digests(data: memoryview, spans: tuple[tuple[int, int], ...], stop: threading.Event) -> bytes:
    """What `packs.chunk_digest` gives for each span, both functions over a block while it is in the cache."""
    found = []
    for begin, nbytes in spans:
        if nbytes <= _HASH_BYTES:
            found.append(pack_format.chunk_digest(data[begin : begin + nbytes]))
            continue
        sha256, xxh3 = hashlib.sha256(), xxhash.xxh3_128()
        for at in range(begin, begin + nbytes, _HASH_BYTES):
            if stop.is_set():
                raise Abandoned("given up")
            block = data[at : min(at + _HASH_BYTES, begin + nbytes)]
            sha256.update(block)
            xxh3.update(block)
        found.append((xxh3.hexdigest() + sha256.hexdigest()).encode())
    return b"".join(found)
