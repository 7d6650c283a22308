"""A rank's or an agent's line to the keeper of its node.

Thread safe. One thread reads what the keeper says; every wait has a bound; when the keeper is gone everything
that waits for it is told at once. It must never stop training: whoever calls decides what a failure means."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

import msgspec

from autoglm_elastic.catalog.format import Pack
from autoglm_elastic.core.commit import Snapshot, Verdict
from autoglm_elastic.errors import ElasticError, PlatformError
from autoglm_elastic.keeper import address, messages
from autoglm_elastic.keeper._greeting import greet, path_of
from autoglm_elastic.keeper._pending import KeeperGone, Pending, Unanswered
from autoglm_elastic.keeper._sender import Sender
from autoglm_elastic.keeper.job import WriteJob
from autoglm_elastic.keeper.memory import ADVICE, Memory, MemoryRefused
from autoglm_elastic.keeper.messages import one_line
from autoglm_elastic.keeper.segments import Pool, Segment
from autoglm_elastic.keeper.start import connect, start
from autoglm_elastic.settings import Keeper as KeeperSettings
from autoglm_elastic.settings import load

AGENT: Final = -1
"""The rank of a client that writes nothing, and is told what its keeper does."""
ANSWER_S: Final = 60.0
"""How long a keeper may take to answer what it does at once; it may be starved by busy neighbours."""
ALLOCATE_S: Final = 300.0
"""How long a segment may take: its pages are touched once, at a few GiB/s."""
FLUSH_S: Final = 2.0
"""How long the end of a connection waits for a keeper that does not read."""
_ATTEMPTS: Final = 3
"""A keeper that ended just when it was found is looked for again."""


class _Answer:
    """What one request waits for."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.message: messages.Reply | None = None
        self.fds: list[int] = []


class _Job:
    def __init__(self, snapshot: Snapshot, segment: int, pending: Pending) -> None:
        self.snapshot, self.segment, self.pending = snapshot, segment, pending
        self.decided = False


OnTold = Callable[[str, dict[str, Any]], None]


def ignore(name: str, fields: dict[str, Any]) -> None:
    """Nobody listens."""


class Keeper:
    """One connection to the keeper of this node and run directory."""

    def __init__(self, connection: socket.socket, pid: int, url: str, on_told: OnTold) -> None:
        self.pid = pid
        self._socket, self._url, self._on_told = connection, url, on_told
        self._lock = threading.RLock()
        self._sender = Sender(connection, self._unsent)
        self._known = messages.Known()
        self._answers: dict[tuple[type[messages.Message], int], _Answer] = {}
        self._jobs: dict[int, _Job] = {}
        self._segments = Pool()
        self._next = 0
        self._rank, self._world_size, self._generation = 0, 1, 0
        self._gone = ""
        _connected.add(self)
        self._reader = threading.Thread(target=self._read, name="autoglm-keeper", daemon=True)

    @classmethod
    def ensure(
        cls,
        url: str,
        *,
        rank: int,
        world_size: int = 1,
        generation: int = 0,
        node: str | None = None,
        settings: KeeperSettings | None = None,
        on_told: OnTold = ignore,
    ) -> Keeper:
        """Connects to the keeper, which is started when there is none. Raises KeeperGone.

        Args:
            url: the run directory.
            rank: AGENT for one that writes nothing.
            node: None for the one that this process' agent named, or else this host.
            settings: of a keeper that has to be started; None for those of the environment.
            on_told: called with (name, fields) of what belongs into the event log, from the reading thread.
        """
        url = address.canonical(url)
        try:
            path = path_of(url, node)
            for _ in range(_ATTEMPTS):
                connection = connect(path, ANSWER_S)
                if connection is None:
                    start(path, url, settings or load(environ=os.environ).settings.keeper)
                    connection = connect(path, ANSWER_S)
                if connection is not None:
                    pid = greet(connection, url, rank, ANSWER_S)
                    if pid is not None:
                        keeper = cls(connection, pid, url, on_told)
                        keeper.enter(rank=rank, world_size=world_size, generation=generation)
                        keeper._reader.start()
                        return keeper
        except KeeperGone:
            raise
        except (ElasticError, OSError) as error:
            raise KeeperGone(one_line(error)) from error
        raise KeeperGone(f"no keeper stayed at {path}")

    @staticmethod
    def listens(url: str, *, node: str | None = None) -> bool:
        """Whether there may be a keeper already. Starts nothing."""
        try:
            return os.path.exists(path_of(address.canonical(url), node))
        except (ElasticError, OSError):
            return False

    def enter(self, *, rank: int, world_size: int, generation: int) -> None:
        """Jobs from now on are of this rank of this generation; segments are kept."""
        with self._lock:
            self._rank, self._world_size, self._generation = rank, world_size, generation

    @property
    def gone(self) -> str:
        """Why there is no keeper at the other end any more, or ""."""
        return self._gone

    def wait_gone(self) -> None:
        """Returns when this connection has ended, from whichever side."""
        self._reader.join()

    def take(self, nbytes: int) -> Segment | None:
        """A free segment of at least `nbytes` that is here already, ours until its snapshot is settled or it is given
        back. Waits for nobody."""
        with self._lock:
            return self._segments.take(nbytes)

    def segment(self, nbytes: int) -> Segment:
        """As `take`; where there is none the keeper is asked for one, and given up when it does not answer. Raises
        ElasticError: KeeperGone, or memory that is refused."""
        with self._lock:
            found = self._segments.take(nbytes)
            if found is not None:
                return found
            small = self._segments.drop_free()
            number = self._number()
        for one in small:
            one.held.close()
            self._say(messages.Free(one.number))
        try:
            answer = self._ask(messages.Allocate(number, nbytes), messages.Allocated, number, ALLOCATE_S)
        except Unanswered as error:
            self._lose(str(error))
            raise KeeperGone(self._gone) from error
        if not isinstance(answer.message, messages.Allocated) or len(answer.fds) != 1:
            raise PlatformError("a segment without memory")
        segment = Segment(number, Memory(answer.fds[0], answer.message.nbytes))
        segment.held.populate()
        with self._lock:
            self._segments.add(segment)
        return segment

    def give_back(self, segment: Segment) -> None:
        """The segment is free again; for one that was never written from."""
        with self._lock:
            self._segments.give_back(segment.number)

    def write(self, job: WriteJob) -> Pending:
        """Returns at once. Never raises for what is the snapshot's failure: `Pending.wait` does."""
        pending = Pending()
        try:
            with self._lock:
                is_written = any(job.segment == one.segment for one in self._jobs.values())
                self._segments.for_job(job, is_written=is_written)
                number = self._number()
                self._jobs[number] = _Job(job.snapshot, job.segment, pending)
                layout, vote, details = (
                    self._remembered(raw) for raw in (msgspec.json.encode(job.packs), job.vote, job.details)
                )
                self._say(
                    messages.Write(
                        number,
                        job.snapshot.step,
                        job.snapshot.generation,
                        self._rank,
                        self._world_size,
                        job.segment,
                        layout,
                        vote,
                        details,
                    )
                )
        except ElasticError as error:
            pending.settle((), error)
        return pending

    def settled(self, snapshot: Snapshot, verdict: Verdict) -> None:
        """What is known here of a snapshot's fate. COMMIT: it is in the catalog. ABORT: it never will be, and the
        packs that it created are removed. UNKNOWN: we cannot tell and do not want to wait: the keeper finishes it as
        if this process had died. The segment is free as soon as it is not read any more."""
        with self._lock:
            for number, job in list(self._jobs.items()):
                if job.snapshot == snapshot and not job.decided:
                    job.decided = True
                    with contextlib.suppress(ElasticError):
                        self._say(messages.Decided(number, verdict.value))
                    self._release(number)

    def settle(self, timeout_s: float) -> bool:
        """Waits until nothing is in flight any more that dead or helpless ranks of this node left. False when
        that takes longer, or when there is no keeper any more."""
        with self._lock:
            number = self._number()
        try:
            self._ask(messages.Settle(number), messages.Settled, number, timeout_s)
        except ElasticError:
            return False
        return True

    def close(self) -> None:
        """Ends the connection in good order; the keeper finishes what is in flight. Idempotent."""
        with contextlib.suppress(ElasticError):
            self._say(messages.Bye())
            self._sender.flush(FLUSH_S)
        self._lose("this side has closed the connection")
        if self._reader.is_alive() and self._reader is not threading.current_thread():
            self._reader.join(timeout=ANSWER_S)
        _connected.discard(self)

    # Speaking

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _say(self, message: messages.Message, raw: bytes = b"") -> None:
        """Waits for nobody. Raises KeeperGone."""
        if self._gone:
            raise KeeperGone(self._gone)
        if not self._sender.put(messages.frame(message, raw)):
            self._lose(f"the keeper (process {self.pid}) does not read what it is sent")
            raise KeeperGone(self._gone)

    def _unsent(self, error: OSError) -> None:
        self._lose(f"the keeper (process {self.pid}) is gone: {error.strerror or error}")

    def _remembered(self, raw: bytes) -> str:
        """The digest by which the keeper knows `raw`, which is sent unless it does."""
        digest = messages.digest_of(raw)
        if self._known.get(digest) is None:
            self._say(messages.Remember(digest), raw)
            self._known.put(digest, b"")
        return digest

    def _ask(
        self, request: messages.Message, reply: type[messages.Message], number: int, timeout_s: float
    ) -> _Answer:
        """Raises KeeperGone; Unanswered when it takes longer; MemoryRefused."""
        answer = _Answer()
        with self._lock:
            self._answers[reply, number] = answer
        try:
            self._say(request)
            if not answer.ready.wait(timeout_s):
                raise Unanswered(f"the keeper (process {self.pid}) did not answer within {timeout_s} s")
        finally:
            with self._lock:
                self._answers.pop((reply, number), None)
        if answer.message is None:
            raise KeeperGone(self._gone)
        if isinstance(answer.message, messages.Refused):
            raise MemoryRefused(answer.message.reason, do=ADVICE)
        return answer

    # Listening

    def _read(self) -> None:
        frames = messages.Frames()
        fds: list[int] = []
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        try:
            while not self._gone:
                poller.poll()
                data, came = messages.receive(self._socket, 1 << 20)
                fds += came
                if not data:
                    self._lose(f"the keeper (process {self.pid}) has ended")
                    break
                frames.feed(data)
                while frame := frames.next():
                    self._hear(messages.REPLIES.decode(frame[0]), fds)
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody must wait for this keeper any longer
            self._lose(f"the keeper (process {self.pid}) is gone: {one_line(error)}")
        finally:
            for fd in fds:
                os.close(fd)
            self._socket.close()

    def _hear(self, message: messages.Reply, fds: list[int]) -> None:
        match message:
            case messages.Allocated():
                self._answer(messages.Allocated, message.number, message, fds)
            case messages.Settled():
                self._answer(messages.Settled, message.number, message)
            case messages.Refused(number=0):
                self._lose(f"the keeper (process {self.pid}) refuses to serve us: {message.reason}")
            case messages.Refused():
                self._answer(messages.Allocated, message.number, message)
            case messages.Wrote():
                self._wrote(message.number, message.packs, None, message.since)
            case messages.Failed():
                self._wrote(message.number, (), PlatformError(message.reason))
            case messages.Told():
                with contextlib.suppress(Exception):
                    self._on_told(message.name, dict(message.fields))

    def _answer(
        self,
        reply: type[messages.Message],
        number: int,
        message: messages.Reply,
        fds: list[int] | None = None,
    ) -> None:
        with self._lock:
            answer = self._answers.get((reply, number))
        if fds and answer is not None:
            answer.fds = [fds.pop(0)]
        if answer is not None:
            answer.message = message
            answer.ready.set()
        elif fds:
            os.close(fds.pop(0))
            self._say(messages.Free(number))

    def _wrote(
        self, number: int, packs: tuple[Pack, ...], error: ElasticError | None, since: float | None = None
    ) -> None:
        with self._lock:
            job = self._jobs.get(number)
            if job is None:
                return
            job.pending.settle(packs, error, since)
            if error is not None:
                job.decided = True
            self._release(number)

    def _release(self, number: int) -> None:
        """The job is over here when it was answered and decided; its segment is free then."""
        job = self._jobs[number]
        if job.decided and job.pending.done():
            del self._jobs[number]
            self._segments.give_back(job.segment)

    def _lose(self, reason: str) -> None:
        if self._gone:
            return
        with self._lock:
            if self._gone:
                return
            self._gone = reason
            self._sender.close()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            answers, jobs = list(self._answers.values()), list(self._jobs.values())
            self._jobs.clear()
            segments = self._segments.empty()
        for answer in answers:
            answer.ready.set()
        for job in jobs:
            job.pending.settle((), KeeperGone(reason))
        for segment in segments:
            segment.held.close()


_connected: weakref.WeakSet[Keeper] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """A child holds its parent's connection open, and the keeper would not see the parent die."""
    for keeper in list(_connected):
        with contextlib.suppress(OSError):
            os.close(keeper._socket.detach())
        keeper._gone = "this process was forked from the one that the keeper serves"


os.register_at_fork(after_in_child=_after_fork_in_child)
