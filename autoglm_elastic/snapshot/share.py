"""Reading together: ranks that want the same of a snapshot fetch each byte of it once, and hand it on to each other.

Where every reader pays for what it reads (an object store), this costs the store the size of the state instead of
that times the ranks. Ranks whose wishes are equal find each other by a digest of them; each reads and verifies its
share straight into its targets; then the shares go around in a ring, with a digest of their own. A failure of one
is every member's failure, before any share is passed on."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import torch
import xxhash

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.format import Manifest
from autoglm_elastic.catalog.opened import OpenPacks
from autoglm_elastic.errors import CorruptSnapshot, ElasticError, PlatformError
from autoglm_elastic.ports import StreamBlobs, Votes, VotesLost
from autoglm_elastic.snapshot.boxes import part
from autoglm_elastic.snapshot.read import READ_S, find_jobs, read_jobs
from autoglm_elastic.snapshot.scatter import Job, Target, is_plain
from autoglm_elastic.snapshot.stage import memory_of

MESSAGE_BYTES: Final = 16 << 20
"""Passed on at a time. What does not lie contiguously on the CPU goes through a buffer: of this size, or of a chunk."""
_ALIGNMENT: Final = 16
"""Of tensors in a buffer: no element is larger."""
_STATUS: Final = struct.Struct("<I252s")
_FINE, _CORRUPT, _FAILED = range(3)
_DIGEST_BYTES: Final = 16


def read_together(blobs: StreamBlobs, manifest: Manifest, targets: Sequence[Target], votes: Votes) -> int:
    """Fills every target; all ranks of `votes` call it. Returns the bytes that this rank read from the store.

    Raises CorruptSnapshot or PlatformError, on all ranks that share with one that failed; targets are partly
    overwritten then."""
    members = _members(votes, _wish(targets))
    with OpenPacks(blobs, manifest) as opened, torch.no_grad():
        if len(members) < 2:
            return read_jobs(opened, find_jobs(opened, manifest, targets, votes.rank, votes.world_size))
        ring = _Ring(votes, members)
        shares: list[list[Job]] = []
        nbytes, failure = 0, None
        try:
            # In the order that the first member would take: the shares must be the same for all.
            jobs = find_jobs(opened, manifest, targets, members[0], votes.world_size)
            shares = _shares(jobs, len(members))
            nbytes = read_jobs(opened, shares[ring.place])
        except ElasticError as error:
            failure = error
        ring.agree(failure)
        ring.pass_on([list(_messages(share)) for share in shares])
    return nbytes


def stand_aside(votes: Votes) -> None:
    """This rank reads nothing after all: the others do not wait for it. Never raises."""
    with contextlib.suppress(PlatformError):
        _members(votes, bytes(hashlib.sha256().digest_size))


def _wish(targets: Iterable[Target]) -> bytes:
    digest = hashlib.sha256()
    for target in targets:
        digest.update(f"{target.name}\0{target.box}\0{target.local.dtype}\n".encode())
    return digest.digest()


def _members(votes: Votes, mine: bytes) -> list[int]:
    """The ranks that want exactly this, in this order; in their order."""
    try:
        wishes = votes.gather(mine)
        told = votes.broadcast(None if wishes is None else b"".join(wishes))
    except VotesLost as error:
        raise PlatformError(f"no agreement on who reads what: {error}") from error
    size = len(mine)
    return [rank for rank in range(votes.world_size) if told[rank * size : (rank + 1) * size] == mine]


def _shares(jobs: Sequence[Job], count: int) -> list[list[Job]]:
    """Consecutive jobs of about equal bytes."""
    total = max(1, sum(job.chunk.nbytes for job in jobs))
    shares: list[list[Job]] = [[] for _ in range(count)]
    at = 0
    for job in jobs:
        shares[min(count - 1, (at + job.chunk.nbytes // 2) * count // total)].append(job)
        at += job.chunk.nbytes
    return shares


class _Buffer:
    """Memory for one direction; grows to the largest message and is kept."""

    def __init__(self) -> None:
        self._raw = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        if self._raw.numel() < nbytes:
            self._raw = torch.zeros(nbytes, dtype=torch.uint8)
        return self._raw[:nbytes]


class _Message:
    """Bytes that travel at once: one stretch of memory, or tensors that go through a buffer."""

    def __init__(self, nbytes: int, memory: memoryview | None, tensors: Sequence[torch.Tensor] = ()) -> None:
        self.nbytes, self._memory, self._tensors = nbytes, memory, tensors

    def ready(self, buffer: _Buffer) -> memoryview:
        """To be sent."""
        if self._memory is None:
            for tensor, place in self._places(buffer):
                place.copy_(tensor)
        return self.room(buffer)

    def room(self, buffer: _Buffer) -> memoryview:
        """To be filled; then `arrived`."""
        return memory_of(buffer.take(self.nbytes)) if self._memory is None else self._memory

    def arrived(self, buffer: _Buffer) -> None:
        if self._memory is None:
            for tensor, place in self._places(buffer):
                tensor.copy_(place)

    def _places(self, buffer: _Buffer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        whole = buffer.take(self.nbytes)
        at = 0
        for tensor in self._tensors:
            nbytes = tensor.numel() * tensor.element_size()
            yield tensor, whole[at : at + nbytes].view(tensor.dtype).view(tensor.shape)
            whole[at + nbytes : at + _padded(nbytes)] = 0  # alike at whoever passes it on, for the digest
            at += _padded(nbytes)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _messages(jobs: Sequence[Job]) -> Iterator[_Message]:
    """What a share has filled, in an order that every member knows."""
    small: list[torch.Tensor] = []
    gathered = 0
    for job in jobs:
        for target, common in job.pieces:
            inside = part(target.local, target.box, common)
            nbytes = inside.numel() * inside.element_size()
            if not nbytes:
                continue
            if is_plain(inside) and nbytes >= MESSAGE_BYTES // 2:
                memory = memory_of(inside)
                for at in range(0, nbytes, MESSAGE_BYTES):
                    stretch = memory[at : at + MESSAGE_BYTES]
                    yield _Message(stretch.nbytes, stretch)
                continue
            if small and gathered + nbytes > MESSAGE_BYTES:
                yield _Message(gathered, None, small)
                small, gathered = [], 0
            small.append(inside)
            gathered += _padded(nbytes)
    if gathered:
        yield _Message(gathered, None, small)


class _Ring:
    """Each member hears from the one before it and speaks to the one behind."""

    def __init__(self, votes: Votes, members: Sequence[int]) -> None:
        self._votes, self._members = votes, members
        self.place = members.index(votes.rank)
        self._behind = members[(self.place + 1) % len(members)]
        self._before = members[self.place - 1]

    def agree(self, failure: ElasticError | None) -> None:
        """Raises what went wrong here, or tells of what went wrong elsewhere, unless every member read its share."""
        kind = _FINE if failure is None else _CORRUPT if isinstance(failure, CorruptSnapshot) else _FAILED
        word = bytearray(_STATUS.pack(kind, str(failure or "").encode()[:252]))
        words = [word]
        for _ in self._members[1:]:
            heard = bytearray(_STATUS.size)
            self._swap(memoryview(words[-1]), memoryview(heard), READ_S)
            words.append(heard)
        if failure is not None:
            raise failure
        for distance, told in enumerate(words):
            kind, reason = _STATUS.unpack(told)
            if kind != _FINE:
                where = self._members[(self.place - distance) % len(self._members)]
                text = f"rank {where}: {reason.rstrip(bytes(1)).decode(errors='replace')}"
                raise CorruptSnapshot(text) if kind == _CORRUPT else PlatformError(text)

    def pass_on(self, shares: Sequence[Sequence[_Message]]) -> None:
        """Every share to every member. Raises CorruptSnapshot when one was damaged on its way, after all is done."""
        count = len(self._members)
        sending, receiving = _Buffer(), _Buffer()
        digest = bytes(_DIGEST_BYTES)
        damaged = ""
        for turn in range(count - 1):
            out, into = shares[(self.place - turn) % count], shares[(self.place - turn - 1) % count]
            sent, got = xxhash.xxh3_128(), xxhash.xxh3_128()
            for number in range(max(len(out), len(into))):
                leaving = out[number].ready(sending) if number < len(out) else memoryview(b"")
                room = into[number].room(receiving) if number < len(into) else memoryview(b"")
                self._swap(leaving, room, limits.VOTE_S)
                if turn == 0:
                    sent.update(leaving)
                got.update(room)
                if number < len(into):
                    into[number].arrived(receiving)
            # Passed on as it was first told, so that nobody vouches for what came to it damaged.
            told = bytearray(_DIGEST_BYTES)
            self._swap(
                memoryview(bytearray(sent.digest() if turn == 0 else digest)), memoryview(told), limits.VOTE_S
            )
            digest = bytes(told)
            if digest != got.digest():
                source = self._members[(self.place - turn - 1) % count]
                damaged = damaged or f"what rank {source} read was damaged on its way here"
        if damaged:
            raise CorruptSnapshot(damaged, do="check the network; load again")

    def _swap(self, out: memoryview, into: memoryview, timeout_s: float) -> None:
        try:
            self._votes.swap(out, self._behind, into, self._before, timeout_s=timeout_s)
        except VotesLost as error:
            raise PlatformError(f"reading a snapshot together: {error}") from error
