"""What travels between `StoreClient` and `StoreServer`: a length (4 bytes, big endian), then one JSON object.

The first frame of a client is `Hello`; everything else carries a request id that its answer repeats. Frames
are capped before they are read (`limits.FRAME_BYTES_MAX`) and decoded into closed types: an unknown op or
field is an error.
"""

from __future__ import annotations

import struct
from typing import Any, Final, TypeVar

import msgspec

from autoglm_elastic.coordination import limits
from autoglm_elastic.ports import EventKind, WatchEvent

PROTOCOL: Final = "autoglm-store/1"
_LENGTH: Final = struct.Struct(">I")
_T = TypeVar("_T")


class FrameError(Exception):
    """The bytes are not our protocol; the message is fit to be sent back and shown."""


class _Message(msgspec.Struct, frozen=True, tag_field="op", forbid_unknown_fields=True):
    pass


class Hello(_Message, frozen=True, tag="hello"):
    """Both ways. `realm`: the run the store serves ("": any). `store`: the server's identity, new with each
    server."""

    protocol: str
    realm: str = ""
    store: str = ""


class PutOperation(_Message, frozen=True, tag="put"):
    key: str
    value: Any
    lease: int = 0


class DeleteOperation(_Message, frozen=True, tag="delete"):
    key: str


class Get(_Message, frozen=True, tag="get"):
    id: int
    key: str


class GetPrefix(_Message, frozen=True, tag="get_prefix"):
    id: int
    prefix: str


class Remove(_Message, frozen=True, tag="remove"):
    id: int
    key: str


class Transact(_Message, frozen=True, tag="txn"):
    id: int
    compares: list[tuple[str, int]]
    operations: list[PutOperation | DeleteOperation]


class LeaseGrant(_Message, frozen=True, tag="lease_grant"):
    """`bound`: the lease ends soon after the connection does (`limits.DISCONNECT_GRACE_S`)."""

    id: int
    ttl_s: float
    bound: bool


class LeaseKeepAlive(_Message, frozen=True, tag="lease_keep_alive"):
    id: int
    lease: int
    bound: bool


class LeaseRevoke(_Message, frozen=True, tag="lease_revoke"):
    id: int
    lease: int


class WatchStart(_Message, frozen=True, tag="watch"):
    id: int
    watch: int
    prefix: str
    from_revision: int


class WatchCancel(_Message, frozen=True, tag="cancel"):
    id: int
    watch: int


class Answer(_Message, frozen=True, tag="answer"):
    id: int
    result: Any


class Refusal(_Message, frozen=True, tag="refusal"):
    """`id` 0: the connection is refused as a whole and closed after this."""

    id: int
    code: str
    message: str


class Changes(_Message, frozen=True, tag="changes"):
    """Events of one watch as [kind, key, value, revision, lost]. `resume`: the revision to ask from after
    these."""

    watch: int
    events: list[tuple[str, str, Any, int, bool]]
    resume: int


Request = (
    Get | GetPrefix | Remove | Transact | LeaseGrant | LeaseKeepAlive | LeaseRevoke | WatchStart | WatchCancel
)
ToClient = Hello | Answer | Refusal | Changes

_encoder = msgspec.json.Encoder()
_hello: msgspec.json.Decoder[Hello] = msgspec.json.Decoder(Hello)
_request: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_to_client: msgspec.json.Decoder[ToClient] = msgspec.json.Decoder(ToClient)


def frame(message: _Message) -> bytes:
    """Raises FrameError when the message is too large, TypeError or ValueError when it holds what is not
    JSON."""
    data = _encoder.encode(message)
    if len(data) > limits.FRAME_BYTES_MAX:
        raise FrameError(f"message of {len(data)} bytes; at most {limits.FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(data)) + data


def take_frame(buffer: bytearray, nbytes_max: int) -> bytes | None:
    """Removes one whole frame from the front of `buffer`, or None. Raises FrameError on a length over the
    cap."""
    if len(buffer) < _LENGTH.size:
        return None
    (nbytes,) = _LENGTH.unpack_from(buffer)
    if nbytes > nbytes_max:
        raise FrameError(f"frame of {nbytes} bytes; at most {nbytes_max}")
    end = _LENGTH.size + nbytes
    if len(buffer) < end:
        return None
    data = bytes(buffer[_LENGTH.size : end])
    del buffer[:end]
    return data


def decode_hello(data: bytes) -> Hello:
    return _decode(_hello, data)


def decode_request(data: bytes) -> Request:
    return _decode(_request, data)


def decode_to_client(data: bytes) -> ToClient:
    return _decode(_to_client, data)


def _decode(decoder: msgspec.json.Decoder[_T], data: bytes) -> _T:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"not a message of {PROTOCOL}: {error}") from None


def pack_event(event: WatchEvent) -> tuple[str, str, Any, int, bool]:
    return event.kind.value, event.key, event.value, event.revision, event.lost


def unpack_event(packed: tuple[str, str, Any, int, bool]) -> WatchEvent:
    kind, key, value, revision, lost = packed
    return WatchEvent(EventKind(kind), key, value, revision, lost)
