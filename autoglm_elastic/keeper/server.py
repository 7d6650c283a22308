"""The keeper: what its clients may ask for, and when it ends.

May touch the run directory, memory and its socket. It must never end because of what a client does, hang on
one, or keep an error to itself. It knows nothing of torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Final

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog.failpoints import Failpoints
from autoglm_elastic.core.commit import Snapshot, Verdict
from autoglm_elastic.keeper import address, memory, messages
from autoglm_elastic.keeper.connections import Client, Hub
from autoglm_elastic.keeper.job import LAYOUTS, check_layout
from autoglm_elastic.keeper.jobs import Job, Jobs
from autoglm_elastic.keeper.memory import Memory
from autoglm_elastic.keeper.messages import ProtocolError, one_line
from autoglm_elastic.ports import StreamBlobs
from autoglm_elastic.settings import Keeper as KeeperSettings

FIRST_CLIENT_S: Final = 30.0
"""How long a new keeper waits for the one who started it."""
IDLE_S: Final = 60.0
"""The loop looks up this often although it is woken for everything."""
_SLOW_THREADS: Final = 2


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
        self._path, self._url, self._settings = path, url, settings
        self._slow = ThreadPoolExecutor(_SLOW_THREADS, thread_name_prefix="autoglm-keeper")
        self._hub = Hub(listener, obey=self._obey, refused=self._refused, lost=self._lost)
        self._jobs = Jobs(
            blobs,
            self._slow,
            failpoint=failpoint,
            wall=wall,
            answer=self._hub.send,
            tell=self._tell,
            post=self._hub.post,
        )
        self._settling: list[tuple[Client, int]] = []
        self._promised = 0
        """Bytes of segments that are being allocated."""
        self._may_linger = True
        self._linger_until = monotonic() + FIRST_CLIENT_S
        self._met = False
        """A client has said hello."""

    def run(self) -> None:
        """Returns when nobody needs this keeper any more; its name is gone then."""
        while not self._may_end():
            idle_s = self._linger_until - monotonic() if self._is_idle() else IDLE_S
            self._hub.turn(min(IDLE_S, max(0.0, idle_s)))
            if self._settling:
                self._hub.look_for_the_dead()
            if self._jobs.is_settled:
                for client, number in self._settling:
                    self._hub.send(client, messages.Settled(number))
                self._settling.clear()

    def hurry(self) -> None:
        """From a signal's handler: do not linger for anybody, end as soon as nobody is connected and nothing in
        flight."""
        self._may_linger = False
        self._linger_until = 0.0
        self._hub.post(lambda: None)

    def _is_idle(self) -> bool:
        return self._hub.is_quiet and self._jobs.is_idle and not self._promised

    def _may_end(self) -> bool:
        if not self._is_idle() or monotonic() < self._linger_until:
            return False
        with address.locked(self._path, wait=False) as held:
            if not held:  # somebody begins to listen: he will find us
                self._linger_until = monotonic() + FIRST_CLIENT_S
                return False
            self._hub.accept()
            if self._hub.clients:
                return False
            address.vanish(self._path)
            self._hub.close()
        self._jobs.close()
        self._slow.shutdown(wait=False)
        return True

    def _lost(self, client: Client) -> None:
        """What a client left is finished without it; its memory goes when nothing is read of it."""
        self._settling = [waiting for waiting in self._settling if waiting[0] is not client]
        if client.rank is not None and not client.left_well and self._may_linger:
            self._linger_until = max(self._linger_until, monotonic() + self._settings.linger_s)
        elif client.rank == -1:
            self._linger_until = 0.0
        needed = {id(one) for one in self._jobs.bereave(client)}
        for segment in client.segments.values():
            if id(segment) not in needed:
                segment.close()
        client.segments.clear()

    def _refused(self, client: Client, reason: str) -> None:
        self._tell("keeper.refused", {"pid": client.pid, "reason": reason})

    def _tell(self, name: str, fields: dict[str, int | float | str | bool | None]) -> None:
        """To the agents, or to everybody when there is none."""
        agents = [client for client in self._hub.clients if client.rank == -1]
        for client in agents or [client for client in self._hub.clients if client.rank is not None]:
            self._hub.send(client, messages.Told(name, fields))

    # Requests

    def _obey(self, client: Client, request: messages.Request, raw: bytes) -> None:
        """Raises ElasticError or msgspec's errors for what a client must not ask."""
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
                try:
                    verdict = Verdict(request.verdict)
                except ValueError as error:
                    raise ProtocolError(str(error)) from error
                self._jobs.decide(client, request.number, verdict)
            case messages.Settle():
                self._settling.append((client, request.number))
            case messages.Bye():
                client.left_well = True

    def _welcome(self, client: Client, hello: messages.Hello) -> None:
        ours = (messages.PROTOCOL, address.our_version(), self._url)
        theirs = (hello.protocol, hello.version, hello.url)
        if theirs != ours or client.rank is not None or hello.rank < -1:
            raise ProtocolError(f"a client of {theirs}", valid=f"{ours}")
        if not self._met:
            self._met, self._linger_until = True, 0.0
        client.rank = hello.rank
        self._hub.send(client, messages.Welcome(os.getpid()))

    def _allocate(self, client: Client, request: messages.Allocate) -> None:
        number, nbytes = request.number, request.nbytes
        if not 0 < nbytes <= messages.SEGMENT_BYTES_MAX or number in client.segments:
            raise ProtocolError(f"segment {number} of {nbytes} bytes")
        reason = memory.refusal(nbytes, self._held_nbytes(), self._settings.memory_max_bytes)
        if reason:
            self._hub.send(client, messages.Refused(number, f"a segment of {nbytes} bytes: {reason}"))
            return
        self._promised += nbytes

        def allocate() -> None:
            try:
                found: Memory | str = Memory.create(nbytes)
            except BaseException as error:  # noqa: BLE001 - told to the client
                found = one_line(error)
            self._hub.post(lambda: allocated(found))

        def allocated(found: Memory | str) -> None:
            self._promised -= nbytes
            if isinstance(found, str):
                self._hub.send(client, messages.Refused(number, f"a segment of {nbytes} bytes: {found}"))
            elif client.gone:
                found.close()
            else:
                client.segments[number] = found
                self._hub.send(client, messages.Allocated(number, found.nbytes), found.fd)

        self._slow.submit(allocate)

    def _free(self, client: Client, number: int) -> None:
        segment = client.segments.get(number)
        if segment is None or self._jobs.uses(segment):
            raise ProtocolError(f"segment {number} is not free")
        del client.segments[number]
        segment.close()

    def _held_nbytes(self) -> int:
        """Of all segments, also those under way and those of the dead."""
        owned = sum(one.nbytes for client in self._hub.clients for one in client.segments.values())
        return owned + self._jobs.orphaned_nbytes() + self._promised

    def _write(self, client: Client, request: messages.Write) -> None:
        segment = client.segments.get(request.segment)
        if segment is None or self._jobs.uses(segment):
            raise ProtocolError(f"segment {request.segment} is not this client's, or is being written")
        if not 0 <= request.rank < request.world_size or min(request.step, request.generation) < 0:
            raise ProtocolError(f"rank {request.rank} of {request.world_size}, step {request.step}")
        raw = [client.known.get(digest) for digest in (request.layout, request.vote, request.details)]
        layout, vote, details = (_found(one) for one in raw)
        packs = LAYOUTS.decode(layout)
        check_layout(packs, segment.nbytes)
        job = Job(
            request.number,
            client,
            Snapshot(request.step, request.generation),
            request.rank,
            request.world_size,
            fmt.decode(vote, fmt.Prepared, f"the vote of rank {request.rank}"),
            details,
            segment,
        )
        self._jobs.start(job, packs)


def _found(raw: bytes | None) -> bytes:
    if raw is None:
        raise ProtocolError("bytes that were not sent, or were forgotten since")
    return raw
