"""What an error of etcd's means for the call that met it."""

from __future__ import annotations

import enum
from typing import Any, Final

from autoglm_elastic.coordination.etcd._package import grpc


class Meaning(enum.Enum):
    ELSEWHERE = "nothing was done, another member may do it"
    UNKNOWN = "it may have been done"
    LOGIN = "our token is not valid any more; nothing was done"
    LEASE_GONE = "the lease has ended; nothing was done"
    COMPACTED = "history does not reach back that far"
    REFUSED = "no; nothing was done"


_Code: Final = grpc.StatusCode
_NEVER_LEFT: Final = (
    "failed to connect to all addresses",
    "DNS resolution failed",
    "etcdserver: no leader",
    "etcdserver: too many requests",
    "etcdserver: not capable",
)
_OLD_TOKEN: Final = ("revision of auth store is old", "invalid auth token")


def meaning(error: Any) -> Meaning:
    """Of a `grpc.RpcError`."""
    code, text = error.code(), details(error)
    if any(each in text for each in _NEVER_LEFT):
        return Meaning.ELSEWHERE
    if code is _Code.UNAUTHENTICATED or any(each in text for each in _OLD_TOKEN):
        return Meaning.LOGIN
    if "requested lease not found" in text:
        return Meaning.LEASE_GONE
    if "required revision has been compacted" in text:
        return Meaning.COMPACTED
    if code in _UNCERTAIN:
        return Meaning.UNKNOWN
    return Meaning.REFUSED


_UNCERTAIN: Final = frozenset(
    {
        _Code.UNAVAILABLE,
        _Code.DEADLINE_EXCEEDED,
        _Code.CANCELLED,
        _Code.UNKNOWN,
        _Code.INTERNAL,
        _Code.ABORTED,
        _Code.DATA_LOSS,
    }
)


def details(error: Any) -> str:
    """In words, one line."""
    return " ".join(str(error.details() or error.code().name).split())


def is_silence(error: Any) -> bool:
    """Whether nobody answered at all: as opposed to an answer that says no."""
    return error.code() in {_Code.UNAVAILABLE, _Code.DEADLINE_EXCEEDED, _Code.CANCELLED} and (
        "etcdserver:" not in details(error)
    )
