"""The boxes that a reader has filled, as messages to others who want the same: cut and packed alike by all, whatever
the strides and devices of their tensors.

A large part of a box that is contiguous on the CPU leaves from, and arrives in, the target's own memory. The
rest goes through a buffer of one message a direction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import torch

from autoglm_elastic.catalog.dtypes import BY_NAME
from autoglm_elastic.catalog.format import Box
from autoglm_elastic.snapshot.boxes import part, split
from autoglm_elastic.snapshot.scatter import Job, Target, is_plain
from autoglm_elastic.snapshot.stage import memory_of

MESSAGE_BYTES: Final = 16 << 20
"""The most that travels at a time."""
_ALONE_BYTES: Final = 1 << 20
"""What is smaller is copied together with others: cheaper than a message of its own."""
_ALIGNMENT: Final = 16
"""Of each part in a message: that of the largest type."""


class Part(NamedTuple):
    """A box within a target."""

    target: Target
    box: Box
    nbytes: int

    @property
    def view(self) -> torch.Tensor:
        return part(self.target.local, self.target.box, self.box)


Message = list[Part]


def messages_of(jobs: Iterable[Job]) -> Iterator[Message]:
    """What the jobs fill, in an order that depends on the boxes only."""
    group: Message = []
    nbytes = 0
    for one in _parts(jobs):
        if one.nbytes >= _ALONE_BYTES:
            yield [one]
            continue
        if nbytes + _padded(one.nbytes) > MESSAGE_BYTES:
            yield group
            group, nbytes = [], 0
        group.append(one)
        nbytes += _padded(one.nbytes)
    if group:
        yield group


def _parts(jobs: Iterable[Job]) -> Iterator[Part]:
    for job in jobs:
        element = BY_NAME[job.dtype].nbytes
        for target, common in job.pieces:
            for box in split(common, element, MESSAGE_BYTES):
                nbytes = math.prod(box[1]) * element
                if nbytes:
                    yield Part(target, box, nbytes)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Packer:
    """The bytes of a message, in one direction. One message at a time."""

    def __init__(self) -> None:
        self._raw = torch.empty(0, dtype=torch.uint8)

    def filled(self, message: Message) -> memoryview:
        """With the values of the targets."""
        direct = _direct(message)
        if direct is not None:
            return direct
        at = 0
        for one, place in self._places(message):
            place.copy_(one.view)
            # Alike at whoever passes it on, for the digest.
            self._raw[at + one.nbytes : at + _padded(one.nbytes)] = 0
            at += _padded(one.nbytes)
        return self._memory(message)

    def empty(self, message: Message) -> memoryview:
        """To be filled; then `unpack`."""
        return _direct(message) or self._memory(message)

    def unpack(self, message: Message) -> None:
        """Into the targets, where it is not there already."""
        if _direct(message) is None:
            for one, place in self._places(message):
                one.view.copy_(place)

    def _memory(self, message: Message) -> memoryview:
        # No padding behind the last: a part that is alone has none in the target's own memory either.
        nbytes = sum(_padded(one.nbytes) for one in message[:-1]) + message[-1].nbytes
        if self._raw.numel() < nbytes:
            self._raw = torch.zeros(nbytes, dtype=torch.uint8)
        return memory_of(self._raw[:nbytes])

    def _places(self, message: Message) -> Iterator[tuple[Part, torch.Tensor]]:
        self._memory(message)
        at = 0
        for one in message:
            raw = self._raw[at : at + one.nbytes]
            yield one, raw.view(one.target.local.dtype).view(one.box[1])
            at += _padded(one.nbytes)


def _direct(message: Message) -> memoryview | None:
    if len(message) == 1 and message[0].nbytes >= _ALONE_BYTES:
        view = message[0].view
        if is_plain(view):
            return memory_of(view)
    return None
