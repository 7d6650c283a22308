"""A pack becomes a durable file: data first, hashed meanwhile, then the header with the digests, then its
name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from autoglm_elastic.catalog import limits, packs
from autoglm_elastic.catalog.format import Pack, pack_path
from autoglm_elastic.catalog.packs import PackPlan
from autoglm_elastic.errors import ElasticError, UsageError
from autoglm_elastic.ports import StreamBlobs
from autoglm_elastic.storage import SyncFailed

WRITE_ATTEMPTS: Final = 2
"""A pack whose fsync failed is written anew under another name, once."""
_HASH_IN_THREAD_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Written:
    """`created`: it was not there."""

    pack: Pack
    created: bool


def write_pack(blobs: StreamBlobs, plan: PackPlan[Any], data: memoryview, rank: int) -> Written:
    """Durable under its content name when this returns. Raises ElasticError; nothing is left behind then."""
    for attempt in range(1, WRITE_ATTEMPTS + 1):
        try:
            return _write_once(blobs, plan, data, rank)
        except SyncFailed:
            if attempt == WRITE_ATTEMPTS:
                raise
    raise UsageError("no attempt was made to write a pack")


def _write_once(blobs: StreamBlobs, plan: PackPlan[Any], data: memoryview, rank: int) -> Written:
    pending = blobs.create(head=len(plan.head))
    try:
        if plan.nbytes < _HASH_IN_THREAD_BYTES:
            pending.write(data)
            digests = _digests(plan, data)
        else:
            with ThreadPoolExecutor(1, thread_name_prefix="autoglm-hash") as pool:
                hashing = pool.submit(_digests, plan, data)
                pending.write(data)
                digests = hashing.result(timeout=limits.VOTE_S)
        head, sha256 = packs.fill(plan.head, plan.digests_at, digests)
        name = pack_path(sha256)
        created = not exists(blobs, name)
    except BaseException:
        pending.discard()
        raise
    try:
        pending.publish(name, head)
    except ElasticError:
        if created:
            remove(blobs, [name])
        raise
    return Written(Pack(sha256, len(head) + plan.nbytes, len(head), rank), created)


def _digests(plan: PackPlan[Any], data: memoryview) -> bytes:
    return b"".join(
        packs.chunk_digest(data[start : start + part.nbytes])
        for part, start in zip(plan.parts, plan.starts, strict=True)
    )


def remove(blobs: StreamBlobs, names: Iterable[str]) -> None:
    """What cannot be removed stays, as garbage that nothing names."""
    for name in names:
        with contextlib.suppress(ElasticError):
            blobs.delete(name)


def exists(blobs: StreamBlobs, name: str) -> bool:
    try:
        blobs.size(name)
    except FileNotFoundError:
        return False
    return True
