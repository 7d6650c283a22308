"""The transport of votes: a dedicated gloo process group, or nobody but oneself. Bytes only, nothing pickled.

Messages are point-to-point with a tag per conversation, so that the training thread and the writer thread can
each hold one over the same group. The group's owner breaks it when the world changes; everybody waiting here
gets `VotesLost` then."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, _get_default_store

from autoglm_elastic.catalog import limits
from autoglm_elastic.errors import PlatformError, UsageError
from autoglm_elastic.ports import Votes, VotesLost

_TAG_BASE: Final = 0x0A00
"""Keeps our tags away from those of a user who sends over the same group."""
_TAGS_A_CHANNEL: Final = 4
_SIZE, _DATA, _NEVER = 0, 1, 2
_LEAVE_S: Final = 0.001
"""Gloo closes a rank's connections when a wait of it takes too long: the one way to close them."""
_TO, _FROM = "sending to", "receiving from"


class SingleVotes:
    """A world of one (ports.Votes)."""

    rank = 0
    world_size = 1

    def gather(self, payload: bytes) -> list[bytes] | None:
        return [payload]

    def broadcast(self, payload: bytes | None) -> bytes:
        if payload is None:
            raise VotesLost("rank 0 gave nothing to broadcast")
        return payload

    def swap(self, out: memoryview, to: int, into: memoryview, source: int, *, timeout_s: float) -> None:
        raise VotesLost("there is no other rank")

    def channel(self, number: int) -> SingleVotes:
        return self

    def leave(self) -> None:
        """Nobody waits."""


def group_of(process_group: dist.ProcessGroup | None) -> Any:
    """A gloo group for the votes of all ranks, or of those of `process_group`; None for one alone. Collective.

    Raises:
        UsageError: there should be other ranks, but torch.distributed does not know of them.
        PlatformError: the group could not be built.
    """
    if not (dist.is_available() and dist.is_initialized()):
        launched = os.environ.get("WORLD_SIZE", "1")
        if process_group is not None or launched not in ("", "1"):
            raise UsageError(
                f"WORLD_SIZE is {launched}, but torch.distributed is not initialized",
                valid="a process group, or votes=SingleVotes() for a directory that this process alone writes to",
                do="call torch.distributed.init_process_group() first",
            )
        return None
    ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
    if dist.get_rank() not in ranks:
        raise UsageError(f"rank {dist.get_rank()} is none of the process group's", valid=f"one of {ranks}")
    if len(ranks) == 1:
        return None
    try:
        return _build(ranks, ranks.index(dist.get_rank()))
    except (RuntimeError, ValueError) as error:
        raise PlatformError(f"no gloo group for the votes: {error}") from error


def _build(ranks: list[int], rank: int) -> Any:
    """Known to nobody but its owner. In a place of its own in the store, counted there: a name that is used twice would
    lead to the addresses of a group that is gone."""
    store = _get_default_store()
    place = f"autoglm/votes/{','.join(map(str, ranks))}"
    count = store.add(f"{place}/{rank}", 1)
    timeout = timedelta(seconds=limits.VOTE_S)
    return ProcessGroupGloo(PrefixStore(f"{place}/{count}", store), rank, len(ranks), timeout)


class GroupVotes:
    """ports.Votes over a gloo process group that nothing else uses.

    Args:
        group: a gloo `ProcessGroup` (from `dist.new_group(backend="gloo")` or built directly).
        timeout_s: bound of every wait for another rank.
        channel: the conversation.
    """

    def __init__(
        self, group: dist.ProcessGroup, *, timeout_s: float = limits.VOTE_S, channel: int = 0
    ) -> None:
        self._group, self._timeout_s = group, timeout_s
        self._tag = _TAG_BASE + channel * _TAGS_A_CHANNEL
        self.rank = group.rank()
        self.world_size = group.size()

    def channel(self, number: int) -> Votes:
        return GroupVotes(self._group, timeout_s=self._timeout_s, channel=number)

    def leave(self) -> None:
        nothing = torch.zeros(1, dtype=torch.uint8)
        for peer in range(self.world_size):
            if peer != self.rank:
                with contextlib.suppress(RuntimeError, ValueError):
                    work = self._group.recv([nothing], peer, self._tag + _NEVER)
                    work.wait(timedelta(seconds=_LEAVE_S))

    def gather(self, payload: bytes) -> list[bytes] | None:
        """Rank 0 waits for the ranks in turn; the first that is lost ends it."""
        if self.rank != 0:
            self._send(0, payload)
            return None
        return [payload, *(self._receive(peer) for peer in range(1, self.world_size))]

    def broadcast(self, payload: bytes | None) -> bytes:
        """Rank 0 serves every peer it can reach before it raises `VotesLost` for one that it cannot."""
        if self.rank != 0:
            return self._receive(0)
        if payload is None:
            raise VotesLost("rank 0 gave nothing to broadcast")
        lost: VotesLost | None = None
        for peer in range(1, self.world_size):
            try:
                self._send(peer, payload)
            except VotesLost as error:
                lost = error
        if lost is not None:
            raise lost
        return payload

    def swap(self, out: memoryview, to: int, into: memoryview, source: int, *, timeout_s: float) -> None:
        sent = got = None
        if into.nbytes:
            room = torch.frombuffer(into, dtype=torch.uint8)
            got = self._start(lambda: self._group.recv([room], source, self._tag + _DATA), _FROM, source)
        if out.nbytes:
            data = torch.frombuffer(out, dtype=torch.uint8)
            sent = self._start(lambda: self._group.send([data], to, self._tag + _DATA), _TO, to)
        if got is not None:
            self._end(got, _FROM, source, timeout_s)
        if sent is not None:
            self._end(sent, _TO, to, timeout_s)

    def _send(self, peer: int, payload: bytes) -> None:
        size = torch.tensor([len(payload)], dtype=torch.int64)
        self._wait(lambda: self._group.send([size], peer, self._tag + _SIZE), _TO, peer)
        if payload:
            data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            self._wait(lambda: self._group.send([data], peer, self._tag + _DATA), _TO, peer)

    def _receive(self, peer: int) -> bytes:
        size = torch.zeros(1, dtype=torch.int64)
        self._wait(lambda: self._group.recv([size], peer, self._tag + _SIZE), _FROM, peer)
        nbytes = int(size.item())
        if not 0 <= nbytes <= limits.VOTE_BYTES_MAX:
            raise VotesLost(f"rank {peer} announced a vote of {nbytes} bytes")
        data = torch.zeros(nbytes, dtype=torch.uint8)
        if nbytes:
            self._wait(lambda: self._group.recv([data], peer, self._tag + _DATA), _FROM, peer)
        return data.numpy().tobytes()

    def _wait(self, start: Callable[[], Any], doing: str, peer: int) -> None:
        self._end(self._start(start, doing, peer), doing, peer, self._timeout_s)

    def _start(self, start: Callable[[], Any], doing: str, peer: int) -> Any:
        try:
            return start()
        except (RuntimeError, ValueError) as error:
            raise _lost(doing, peer, error) from error

    def _end(self, work: Any, doing: str, peer: int, timeout_s: float) -> None:
        try:
            work.wait(timedelta(seconds=timeout_s))
        except (RuntimeError, ValueError) as error:
            raise _lost(doing, peer, error) from error


def _lost(doing: str, peer: int, error: Exception) -> VotesLost:
    return VotesLost(f"{doing} rank {peer}: {str(error).splitlines()[0][:160]}")
