"""Reading together: ranks that want the same of a snapshot fetch each byte of it once, and hand it on to each other.

Where every reader pays for what it reads (an object store), this costs the store the size of the state instead of
that times the ranks. Ranks whose wishes are equal find each other by a digest of them; each reads and verifies its
share straight into its targets; then the shares go around in a ring, with a digest of their own. A failure of one
is every member's failure; a rank that is lost is missed by all at once, also by those it never speaks to."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Final

import torch

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.format import Manifest
from autoglm_elastic.catalog.opened import OpenPacks
from autoglm_elastic.catalog.packs import Digest
from autoglm_elastic.errors import CorruptSnapshot, ElasticError, PlatformError
from autoglm_elastic.ports import StreamBlobs, Votes, VotesLost
from autoglm_elastic.snapshot.messages import Packer, messages_of
from autoglm_elastic.snapshot.read import READ_S, find_jobs, read_jobs
from autoglm_elastic.snapshot.scatter import Job, Target

_TEXT_BYTES: Final = 508
_STATUS: Final = struct.Struct(f"<I{_TEXT_BYTES}s")
_FINE, _CORRUPT, _FAILED = range(3)
_DIGEST_BYTES: Final = 16
_NOTHING: Final = memoryview(bytearray())


def read_together(blobs: StreamBlobs, manifest: Manifest, targets: Sequence[Target], votes: Votes) -> int:
    """Fills every target; all ranks of `votes` call it. Returns the bytes that this rank read from the store.

    Raises CorruptSnapshot or PlatformError, on all ranks that share with one that failed; targets are partly
    overwritten then."""
    with _leaving(votes):
        members = _members(votes, _wish(manifest, targets))
    with OpenPacks(blobs, manifest) as opened, torch.no_grad():
        if len(members) < 2:
            return read_jobs(opened, find_jobs(opened, manifest, targets, votes.rank, votes.world_size))
        with _leaving(votes):
            ring = _Ring(votes, members)
            shares: list[list[Job]] = []
            nbytes = 0
            failure: Exception | None = None
            try:
                # In the order that the first member would take: the shares must be the same for all.
                jobs = find_jobs(opened, manifest, targets, members[0], votes.world_size)
                shares = _shares(jobs, len(members))
                nbytes = read_jobs(opened, shares[ring.place])
            except Exception as error:  # noqa: BLE001 - raised by `agree`, here and at the others
                failure = error
            ring.agree(failure)
            ring.agree(ring.pass_on(shares))
    return nbytes


@contextlib.contextmanager
def excused(votes: Votes | None) -> Iterator[None]:
    """What raises in here, before `read_together`, keeps nobody waiting. None: nobody waits."""
    try:
        yield
    except Exception:
        if votes is not None:
            with contextlib.suppress(PlatformError), _leaving(votes):
                _members(votes, bytes(hashlib.sha256().digest_size))
        raise
    except BaseException:
        if votes is not None:
            votes.leave()
        raise


@contextlib.contextmanager
def _leaving(votes: Votes) -> Iterator[None]:
    """Who has lost a rank, or is interrupted, lets nobody wait for what it does not say any more."""
    try:
        yield
    except VotesLost as error:
        votes.leave()
        raise PlatformError(
            f"reading a snapshot together: {error}", do="load again with all ranks"
        ) from error
    except Exception:
        raise
    except BaseException:
        votes.leave()
        raise


def _wish(manifest: Manifest, targets: Iterable[Target]) -> bytes:
    """Of the same packs the same boxes."""
    digest = hashlib.sha256()
    for pack in manifest.packs:
        digest.update(f"{pack.sha256}\n".encode())
    for target in targets:
        digest.update(f"{target.name}\0{target.box}\0{target.local.dtype}\n".encode())
    return digest.digest()


def _members(votes: Votes, mine: bytes) -> list[int]:
    """The ranks that want exactly this, in this order; in their order. Raises VotesLost."""
    wishes = votes.gather(mine)
    told = votes.broadcast(None if wishes is None else b"".join(wishes))
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


class _Ring:
    """Each member hears from the one before it and speaks to the one behind."""

    def __init__(self, votes: Votes, members: Sequence[int]) -> None:
        self._votes, self._members = votes, members
        self.place = members.index(votes.rank)
        self._behind = members[(self.place + 1) % len(members)]
        self._before = members[self.place - 1]

    def agree(self, failure: Exception | None) -> None:
        """Raises what went wrong here, or tells of what went wrong elsewhere, unless nothing did at any member. Raises
        VotesLost."""
        kind = _FINE if failure is None else _CORRUPT if isinstance(failure, CorruptSnapshot) else _FAILED
        word = bytearray(_STATUS.pack(kind, _text(failure).encode()[:_TEXT_BYTES]))
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

    def pass_on(self, shares: Sequence[Sequence[Job]]) -> CorruptSnapshot | None:
        """Every share to every member. Returns what came damaged to this one, after all is done. Raises VotesLost."""
        count = len(self._members)
        sending, receiving = Packer(), Packer()
        known = b""
        damaged: CorruptSnapshot | None = None
        for turn in range(count - 1):
            leaving, coming = shares[(self.place - turn) % count], shares[(self.place - turn - 1) % count]
            sent, got = Digest(), Digest()
            for out, into in zip_longest(messages_of(leaving), messages_of(coming)):
                data = sending.filled(out) if out else _NOTHING
                room = receiving.empty(into) if into else _NOTHING
                self._swap(data, room, limits.VOTE_S)
                if turn == 0:
                    sent.update(data)
                got.update(room)
                if into:
                    receiving.unpack(into)
            # Passed on as it was first told, so that nobody vouches for what came to it damaged.
            told = bytearray(_DIGEST_BYTES)
            self._swap(memoryview(bytearray(known or sent.digest())), memoryview(told), limits.VOTE_S)
            known = bytes(told)
            if known != got.digest() and damaged is None:
                source = self._members[(self.place - turn - 1) % count]
                damaged = CorruptSnapshot(
                    f"what rank {source} read was damaged on its way to rank {self._votes.rank}",
                    do="check the network; load again",
                )
        return damaged

    def _swap(self, out: memoryview, into: memoryview, timeout_s: float) -> None:
        self._votes.swap(out, self._behind, into, self._before, timeout_s=timeout_s)


def _text(error: Exception | None) -> str:
    if error is None:
        return ""
    return str(error) if isinstance(error, ElasticError) else f"{type(error).__name__}: {error}"
