"""The keeper: one thread that listens to everybody and decides what is to be done; others write, hash, allocate
and finish for it.

May touch the run directory, memory and its socket. It must never end because of what a client does, hang on
one, or keep an error to itself. It knows nothing of torch, and of snapshots no more than `finish` does."""

from __future__ import annotations

import collections
import contextlib
import os
import select
import selectors
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

import msgspec

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import prepared as records
from autoglm_elastic.catalog.failpoints import Failpoints
from autoglm_elastic.catalog.write import remove
from autoglm_elastic.core.commit import Snapshot, Verdict
from autoglm_elastic.errors import ElasticError, UsageError
from autoglm_elastic.keeper import address, memory, messages
from autoglm_elastic.keeper.finish import Fate, Finisher
from autoglm_elastic.keeper.job import LAYOUTS, check_layout
from autoglm_elastic.keeper.memory import Memory
from autoglm_elastic.keeper.messages import ProtocolError, one_line
from autoglm_elastic.keeper.writer import Result, Work, Writer
from autoglm_elastic.ports import StreamBlobs
from autoglm_elastic.settings import Keeper as KeeperSettings

READ_BYTES: Final = 1 << 20
UNSENT_BYTES_MAX: Final = 64 << 20
"""What a client may leave unread before it is taken for helpless and let go."""
CONNECTIONS_MAX: Final = 4096
JOBS_MAX: Final = 16
"""Of one client, not settled: two are in flight at most, the rest is slack."""
FIRST_CLIENT_S: Final = 30.0
"""How long a new keeper waits for the one who started it."""
IDLE_S: Final = 60.0
"""The loop looks up this often although it is woken for everything."""


@dataclass(slots=True, eq=False)
class _Job:
    """Packs of one rank. It is over when they are durable (or failed) *and* its snapshot's fate is known or has
    been handed to the finisher."""

    number: int
    owner: _Client | None
    snapshot: Snapshot
    rank: int
    world_size: int
    prepared: fmt.Prepared
    details: bytes
    memory: Memory
    work: Work | None = None
    result: Result | None = None
    verdict: Verdict | None = None
    owns_memory: bool = False
    """Its client died while it was written."""


@dataclass(slots=True, eq=False)
class _Client:
    """One connection."""

    socket: socket.socket
    pid: int
    frames: messages.Frames = field(default_factory=messages.Frames)
    known: messages.Known = field(default_factory=messages.Known)
    unsent: collections.deque[tuple[bytes, int]] = field(default_factory=collections.deque)
    """(bytes, descriptor that goes with them or -1)."""
    unsent_nbytes: int = 0
    rank: int | None = None
    """None until it has said hello; -1 for an agent."""
    segments: dict[int, Memory] = field(default_factory=dict)
    jobs: dict[int, _Job] = field(default_factory=dict)
    left_well: bool = False
    gone: bool = False


class Server:
    """Serves one run directory until nobody needs it.

    Args:
        listener: non-blocking; its name is `path`.
        url: the run directory's canonical name, which clients must give.
        wall: seconds since the epoch, for the catalog.
    """

    def __init__(
        self,
        listener: socket.socket,
        path: str,
        url: str,
        blobs: StreamBlobs,
        settings: KeeperSettings,
        *,
        failpoint: Failpoints,
        wall: Callable[[], float],
    ) -> None:
        self._listener, self._path, self._url, self._blobs = listener, path, url, blobs
        self._settings, self._failpoint = settings, failpoint
        self._writer = Writer(blobs, failpoint)
        self._finisher = Finisher(blobs, failpoint, wall)
        self._slow = ThreadPoolExecutor(2, thread_name_prefix="autoglm-keeper")
        """Allocates and finishes: what may take a while."""
        self._clients: set[_Client] = set()
        self._orphans: set[_Job] = set()
        """Jobs whose clients are gone or have given them to us, until they are over."""
        self._settling: list[tuple[_Client, int]] = []
        self._promised = 0
        """Bytes of segments that are being allocated."""
        self._linger_until = monotonic() + FIRST_CLIENT_S
        self._met = False
        """A client has said hello."""
        self._todo: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._selector.register(listener, selectors.EVENT_READ)

    def run(self) -> None:
        """Returns when nobody needs this keeper any more; its name is gone then."""
        while not self._may_end():
            for key, events in self._selector.select(self._patience_s()):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, _Client):
                    self._serve(key.data, events)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            while self._todo:
                self._todo.popleft()()
            self._answer_settling()

    def post(self, action: Callable[[], None]) -> None:
        """From other threads: `action` runs in the loop."""
        self._todo.append(action)
        os.eventfd_write(self._wake, 1)

    # Ending

    def _is_idle(self) -> bool:
        return not (self._clients or self._orphans or self._todo or self._promised)

    def _patience_s(self) -> float:
        if self._is_idle():
            return min(IDLE_S, max(0.0, self._linger_until - monotonic()))
        return IDLE_S

    def _may_end(self) -> bool:
        if not self._is_idle() or monotonic() < self._linger_until:
            return False
        with address.locked(self._path, wait=False) as held:
            if not held:  # somebody begins to listen: he will find us
                self._linger_until = monotonic() + FIRST_CLIENT_S
                return False
            self._accept()
            if self._clients:
                return False
            address.vanish(self._path)
            self._listener.close()
        self._writer.close()
        self._slow.shutdown(wait=False)
        return True

    # Connections

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            try:
                connection.setblocking(False)
                client = _Client(connection, address.peer_of(connection))
                if len(self._clients) >= CONNECTIONS_MAX:
                    raise UsageError(f"{len(self._clients)} connections")
                self._selector.register(connection, selectors.EVENT_READ, client)
            except (ElasticError, OSError):
                connection.close()
                continue
            self._clients.add(client)

    def _serve(self, client: _Client, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(client)
        if events & selectors.EVENT_READ:
            self._drain(client)

    def _drain(self, client: _Client) -> None:
        """Reads and obeys what is there; a malformed message costs the client its connection."""
        reason = ""
        while not client.gone:
            try:
                data, fds = messages.receive(client.socket, READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                self._lose(client)
                return
            for fd in fds:
                os.close(fd)
            if not data:
                self._lose(client)
                return
            try:
                client.frames.feed(data)
                while not client.gone and (frame := client.frames.next()):
                    self._obey(client, messages.REQUESTS.decode(frame[0]), frame[1])
            except (ElasticError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
                reason = one_line(error)
            except Exception as error:  # noqa: BLE001 - a bug met by one client's message must not cost the others
                reason = one_line(error)
            if reason:
                self._send(client, messages.Refused(0, reason))
                self._tell("keeper.refused", {"pid": client.pid, "reason": reason})
                self._lose(client)

    def _lose(self, client: _Client) -> None:
        """The client is gone. What it left is finished without it; its memory goes when nothing is read of it."""
        if client.gone:
            return
        client.gone = True
        self._clients.discard(client)
        self._selector.unregister(client.socket)
        client.socket.close()
        self._settling = [waiting for waiting in self._settling if waiting[0] is not client]
        if client.rank is not None and not client.left_well:
            self._linger_until = max(self._linger_until, monotonic() + self._settings.linger_s)
        elif client.rank == -1:
            self._linger_until = 0.0
        busy = [job.memory for job in client.jobs.values()]
        for segment in client.segments.values():
            if segment not in busy:
                segment.close()
        client.segments.clear()
        for job in list(client.jobs.values()):
            job.owner = None
            job.owns_memory = True
            self._orphans.add(job)
            job.verdict = job.verdict or Verdict.UNKNOWN
            self._advance(job)
        client.jobs.clear()

    def _send(self, client: _Client, message: messages.Message, fd: int = -1) -> None:
        if client.gone:
            return
        data = messages.frame(message)
        client.unsent.append((data, fd))
        client.unsent_nbytes += len(data)
        self._flush(client)

    def _flush(self, client: _Client) -> None:
        try:
            while client.unsent:
                data, fd = client.unsent.popleft()
                sent = 0
                try:
                    sent = (
                        socket.send_fds(client.socket, [data], [fd]) if fd >= 0 else client.socket.send(data)
                    )
                finally:
                    if sent < len(data):
                        client.unsent.appendleft((data[sent:], -1 if sent else fd))
                    client.unsent_nbytes -= sent
        except BlockingIOError:
            pass
        except OSError:
            self._lose(client)
            return
        if client.unsent_nbytes > UNSENT_BYTES_MAX:
            self._lose(client)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
        self._selector.modify(client.socket, events, client)

    def _tell(self, name: str, fields: dict[str, int | float | str | bool | None]) -> None:
        """To the agents, or to everybody when there is none."""
        agents = [client for client in self._clients if client.rank == -1]
        for client in agents or [client for client in self._clients if client.rank is not None]:
            self._send(client, messages.Told(name, fields))

    # Requests

    def _obey(self, client: _Client, request: messages.Request, raw: bytes) -> None:
        if client.rank is None and not isinstance(request, messages.Hello):
            raise ProtocolError(f"{type(request).__name__} before hello")
        match request:
            case messages.Hello():
                self._welcome(client, request)
            case messages.Allocate():
                self._allocate(client, request)
            case messages.Free():
                self._free(client, request.number)
            case messages.Remember():
                if messages.digest_of(raw) != request.digest:
                    raise ProtocolError("bytes that are not those of their digest")
                client.known.put(request.digest, raw)
            case messages.Write():
                self._write(client, request)
            case messages.Decided():
                job = client.jobs.get(request.number)
                if job is not None and job.verdict is None:
                    job.verdict = Verdict(request.verdict)
                    self._advance(job)
            case messages.Settle():
                self._settling.append((client, request.number))
            case messages.Bye():
                client.left_well = True

    def _welcome(self, client: _Client, hello: messages.Hello) -> None:
        ours = (messages.PROTOCOL, address.our_version(), self._url)
        theirs = (hello.protocol, hello.version, hello.url)
        if theirs != ours or client.rank is not None or hello.rank < -1:
            raise ProtocolError(f"a client of {theirs}", valid=f"{ours}")
        if not self._met:
            self._met, self._linger_until = True, 0.0
        client.rank = hello.rank
        self._send(client, messages.Welcome(os.getpid()))

    def _allocate(self, client: _Client, request: messages.Allocate) -> None:
        if not 0 < request.nbytes <= messages.SEGMENT_BYTES_MAX:
            raise ProtocolError(f"a segment of {request.nbytes} bytes")
        number, nbytes = request.number, request.nbytes
        reason = memory.refusal(nbytes, self._held + self._promised, self._settings.memory_max_bytes)
        if number in client.segments:
            raise ProtocolError(f"segment {number} a second time")
        if reason:
            self._send(client, messages.Refused(number, f"a segment of {nbytes} bytes: {reason}"))
            return
        self._promised += nbytes

        def allocate() -> None:
            try:
                found: Memory | str = Memory.create(nbytes)
            except BaseException as error:  # noqa: BLE001 - told to the client
                found = one_line(error)
            self.post(lambda: allocated(found))

        def allocated(found: Memory | str) -> None:
            self._promised -= nbytes
            if isinstance(found, str):
                self._send(client, messages.Refused(number, f"a segment of {nbytes} bytes: {found}"))
            elif client.gone:
                found.close()
            else:
                client.segments[number] = found
                self._send(client, messages.Allocated(number, found.nbytes), found.fd)

        self._slow.submit(allocate)

    def _free(self, client: _Client, number: int) -> None:
        segment = client.segments.get(number)
        if segment is None or any(job.memory is segment for job in client.jobs.values()):
            raise ProtocolError(f"segment {number} is not free")
        del client.segments[number]
        segment.close()

    @property
    def _held(self) -> int:
        """Bytes of all segments."""
        segments = {id(one): one.nbytes for client in self._clients for one in client.segments.values()}
        segments |= {id(job.memory): job.memory.nbytes for job in self._orphans if job.owns_memory}
        return sum(segments.values())

    def _write(self, client: _Client, request: messages.Write) -> None:
        segment = client.segments.get(request.segment)
        if segment is None or any(job.memory is segment for job in client.jobs.values()):
            raise ProtocolError(f"segment {request.segment} is not this client's, or is being written")
        if request.number in client.jobs or len(client.jobs) >= JOBS_MAX:
            raise ProtocolError(f"job {request.number}: {len(client.jobs)} are not settled")
        if not 0 <= request.rank < request.world_size or min(request.step, request.generation) < 0:
            raise ProtocolError(f"rank {request.rank} of {request.world_size}, step {request.step}")
        raw = [client.known.get(digest) for digest in (request.layout, request.vote, request.details)]
        layout, vote, details = (_found(one) for one in raw)
        packs = LAYOUTS.decode(layout)
        check_layout(packs, segment.nbytes)
        job = _Job(
            request.number,
            client,
            Snapshot(request.step, request.generation),
            request.rank,
            request.world_size,
            fmt.decode(vote, fmt.Prepared, f"the vote of rank {request.rank}"),
            details,
            segment,
        )
        client.jobs[job.number] = job
        self._failpoint("job_taken")
        job.work = self._writer.start(
            segment.view, packs, job.rank, lambda result: self.post(lambda: self._written(job, result))
        )

    # The life of a job

    def _written(self, job: _Job, result: Result) -> None:
        job.result = result
        if job.owner is not None:
            if result.reason:
                self._send(job.owner, messages.Failed(job.number, result.reason))
            else:
                self._send(job.owner, messages.Wrote(job.number, result.packs))
        self._advance(job)

    def _advance(self, job: _Job) -> None:
        """The next thing to do for a job of which something new is known."""
        if job.verdict is Verdict.ABORT and job.result is None and job.work is not None:
            job.work.stop.set()
        if job.result is None:
            return
        if job.result.reason or job.verdict is Verdict.COMMIT:
            self._over(job)
        elif job.verdict is Verdict.ABORT:
            self._orphan(job)
            self._slow.submit(self._take_back, job)
        elif job.verdict is Verdict.UNKNOWN:
            self._orphan(job)
            self._slow.submit(self._finish, job)

    def _orphan(self, job: _Job) -> None:
        """Written, and its client does not ask for it any more; what is left to do needs no memory."""
        if job.owner is not None:
            job.owner.jobs.pop(job.number, None)
            job.owner = None
        self._orphans.add(job)

    def _over(self, job: _Job) -> None:
        if job.owner is not None:
            job.owner.jobs.pop(job.number, None)
        self._orphans.discard(job)
        if job.owns_memory:
            job.memory.close()

    def _take_back(self, job: _Job) -> None:
        try:
            if job.result is not None:
                remove(self._blobs, job.result.created)
        finally:
            self.post(lambda: self._over(job))

    def _finish(self, job: _Job) -> None:
        """In a thread: the snapshot is finished without its rank."""
        fate, reason = Fate.WAITING, ""
        try:
            packs = () if job.result is None else job.result.packs
            details = fmt.decode(job.details, records.Details, f"the details of rank {job.rank}")
            prepared = msgspec.structs.replace(job.prepared, packs=packs)
            fate, reason = self._finisher.finish(job.snapshot, job.rank, job.world_size, prepared, details)
        except BaseException as error:  # noqa: BLE001 - told to the agents; the snapshot does not happen
            reason = one_line(error)
        finally:
            self.post(lambda: self._finished(job, fate, reason))

    def _finished(self, job: _Job, fate: Fate, reason: str) -> None:
        where = {"step": job.snapshot.step, "generation": job.snapshot.generation, "rank": job.rank}
        self._tell("snapshot.finished", {**where, "fate": fate.value, "reason": reason})
        self._over(job)

    # Settling

    def _answer_settling(self) -> None:
        """A death that the kernel knows of counts, although its message may still lie unread."""
        if not self._settling:
            return
        for client in list(self._clients):
            if _has_hung_up(client.socket):
                self._drain(client)
        given_up = any(job.verdict for client in self._clients for job in client.jobs.values())
        if self._orphans or given_up:
            return
        for client, number in self._settling:
            self._send(client, messages.Settled(number))
        self._settling.clear()


def _has_hung_up(connection: socket.socket) -> bool:
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP)
    return bool(poller.poll(0))


def _found(raw: bytes | None) -> bytes:
    if raw is None:
        raise ProtocolError("bytes that were not sent, or were forgotten since")
    return raw
