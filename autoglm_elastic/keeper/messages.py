"""What a keeper and its clients say to each other: one frame, one message, over a unix stream socket.

A frame is two lengths (of the JSON and of the raw bytes behind it, four and eight bytes, little endian), the
JSON, the raw bytes. Descriptors travel beside the first byte of a frame (SCM_RIGHTS). Sizes are capped before
anything is allocated, nothing is ever unpickled. Pure but for the sockets that it is handed."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
from collections import OrderedDict
from typing import Final

import msgspec

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.format import Pack
from autoglm_elastic.errors import ElasticError, PlatformError

PROTOCOL: Final = 2
"""Keepers and clients of different numbers do not talk."""
JSON_BYTES_MAX: Final = 64 << 10
"""One message without its raw bytes: a handful of numbers and names."""
RAW_BYTES_MAX: Final = limits.VOTE_BYTES_MAX
"""Raw bytes of one frame: a vote, a structure, or a layout."""
KNOWN_MAX: Final = 8
"""Raw byte strings that both sides remember by digest, so that what repeats between snapshots is sent once."""
SEGMENT_BYTES_MAX: Final = 1 << 42
PACKS_MAX: Final = 10_000
SPANS_MAX: Final = limits.CHUNKS_MAX
TEXT_CHARS_MAX: Final = 2000
"""An error's text; longer ones are cut."""
_LENGTHS: Final = struct.Struct("<IQ")
_FDS_MAX: Final = 4


class ProtocolError(PlatformError):
    """The other side sent what it must not: the connection is of no use any more."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op"):
    """Base of all messages."""


class Hello(Message, frozen=True, tag="hello"):
    """First message of a client. `rank` -1: an agent, which writes nothing."""

    protocol: int
    version: str
    url: str
    rank: int


class Welcome(Message, frozen=True, tag="welcome"):
    pid: int


class Refused(Message, frozen=True, tag="refused"):
    """The keeper does not serve this client, or will not do what request `number` asked for."""

    number: int
    reason: str


class Allocate(Message, frozen=True, tag="allocate"):
    """A segment, please; answered by `Allocated` with its memory's descriptor."""

    number: int
    nbytes: int


class Allocated(Message, frozen=True, tag="allocated"):
    number: int
    nbytes: int


class Free(Message, frozen=True, tag="free"):
    """Segment `number` is not needed any more."""

    number: int


class Remember(Message, frozen=True, tag="remember"):
    """The frame's raw bytes will be meant by their digest."""

    digest: str


class Write(Message, frozen=True, tag="write"):
    """Write the packs laid out in segment `segment`. `layout`, `vote`, `details`: digests of remembered bytes;
    the layout is a tuple of PackImage as JSON."""

    number: int
    step: int
    generation: int
    rank: int
    world_size: int
    segment: int
    layout: str
    vote: str
    details: str


class Wrote(Message, frozen=True, tag="wrote"):
    """All packs of job `number` are durable under their names; `since`: as in fmt.Prepared."""

    number: int
    packs: tuple[Pack, ...]
    since: float | None = None


class Failed(Message, frozen=True, tag="failed"):
    number: int
    reason: str


class Decided(Message, frozen=True, tag="decided"):
    """What became of the snapshot of job `number`, as far as its rank knows: commit, abort or unknown."""

    number: int
    verdict: str


class Settle(Message, frozen=True, tag="settle"):
    """Answer `Settled` when nothing is in flight any more that dead or helpless clients left."""

    number: int


class Settled(Message, frozen=True, tag="settled"):
    number: int


class Told(Message, frozen=True, tag="told"):
    """Something for the run's event log; sent to agents, or to everybody when there is none."""

    name: str
    fields: dict[str, int | float | str | bool | None]


class Bye(Message, frozen=True, tag="bye"):
    """The client ends in good order: no need to linger for it."""


Request = Hello | Allocate | Free | Remember | Write | Decided | Settle | Bye
Reply = Welcome | Refused | Allocated | Wrote | Failed | Settled | Told

_encoder = msgspec.json.Encoder()
REQUESTS: Final = msgspec.json.Decoder(Request, strict=True)
REPLIES: Final = msgspec.json.Decoder(Reply, strict=True)


def frame(message: Message, raw: bytes = b"") -> bytes:
    """Raises ProtocolError for a message beyond the caps."""
    text = _encoder.encode(message)
    if len(text) > JSON_BYTES_MAX or len(raw) > RAW_BYTES_MAX:
        raise ProtocolError(
            f"a message of {len(text)} and {len(raw)} bytes", valid=f"{JSON_BYTES_MAX} and {RAW_BYTES_MAX}"
        )
    return _LENGTHS.pack(len(text), len(raw)) + text + raw


def receive(connection: socket.socket, nbytes: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """What is there, and descriptors that came along (close-on-exec, the caller's to close)."""
    data, fds, _, _ = socket.recv_fds(connection, nbytes, _FDS_MAX, flags)
    for fd in fds:
        os.set_inheritable(fd, False)
    return data, fds


class Frames:
    """Bytes in, (JSON, raw) out; raises ProtocolError as soon as a length is beyond its cap."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> tuple[bytes, bytes] | None:
        if len(self._buffer) < _LENGTHS.size:
            return None
        text, raw = _LENGTHS.unpack_from(self._buffer)
        if text > JSON_BYTES_MAX or raw > RAW_BYTES_MAX:
            raise ProtocolError(
                f"a frame of {text} and {raw} bytes", valid=f"at most {JSON_BYTES_MAX} and {RAW_BYTES_MAX}"
            )
        end = _LENGTHS.size + text + raw
        if len(self._buffer) < end:
            return None
        whole = bytes(self._buffer[_LENGTHS.size : end])
        del self._buffer[:end]
        return whole[:text], whole[text:]


def digest_of(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


class Known:
    """Byte strings by digest, the least recently used forgotten; both sides keep one and apply the same
    rule."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def put(self, digest: str, raw: bytes) -> None:
        self._kept[digest] = raw
        self._kept.move_to_end(digest)
        while len(self._kept) > KNOWN_MAX:
            self._kept.popitem(last=False)

    def get(self, digest: str) -> bytes | None:
        raw = self._kept.get(digest)
        if raw is not None:
            self._kept.move_to_end(digest)
        return raw


def one_line(error: BaseException) -> str:
    """An error as the other side shows it."""
    text = " ".join(str(error).split())
    if not isinstance(error, ElasticError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text[:TEXT_CHARS_MAX]
