"""What the core needs of the world, as Protocols. Adapters implement them; nothing here does anything.

`Store` is modelled on etcd v3. `Blobs` is the little of a file system or object store that a snapshot needs.
`Votes` carries the two-phase commit. `Clock` is the only source of time for whatever is driven by a machine of `core`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from autoglm_elastic.core.outcome import Outcome as Outcome

Json = Any
"""None, bool, int, float, str, list or dict with str keys: nothing else travels or is stored."""


class Clock(Protocol):
    """Time as the adapters see it."""

    def monotonic(self) -> float:
        """Seconds; only differences mean anything."""

    def wall(self) -> float:
        """Seconds since the epoch, for people to read; never for decisions."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a store. `lease` is 0 for a key that no lease owns."""

    key: str
    value: Json
    create_revision: int
    mod_revision: int
    lease: int = 0


class EventKind(enum.Enum):
    PUT = "put"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """A change. For DELETE `value` is None. `lost` marks a watch that could not resume: read everything again."""

    kind: EventKind
    key: str
    value: Json
    revision: int
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Compare:
    """`key` must be at `mod_revision` (0: must not exist)."""

    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: Json
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


@dataclass(frozen=True, slots=True)
class Txn:
    outcome: Outcome
    revision: int
    entries: tuple[Entry, ...] = field(default=())


class StoreUnavailable(Exception):
    """The store did not answer in time. `sent` says that the request may have taken effect (Outcome.UNKNOWN)."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class Watch(Protocol):
    def cancel(self) -> None:
        """Stop; idempotent; no callback begins after it returned."""


class Store(Protocol):
    """The coordination store. Thread safe. Every call is bounded in time and raises `StoreUnavailable` past it."""

    def get(self, key: str) -> Entry | None: ...

    def get_prefix(self, prefix: str) -> tuple[list[Entry], int]:
        """All entries under `prefix`, ordered by key, and the store's revision they were read at."""

    def put(self, key: str, value: Json, *, lease: int = 0) -> int:
        """Returns the revision of the write."""

    def delete(self, key: str) -> bool:
        """True when the key existed."""

    def txn(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Txn:
        """All operations if all compares hold (OK), none otherwise (CONFLICT, with the compared entries)."""

    def lease_grant(self, ttl_s: float) -> int: ...

    def lease_keep_alive(self, lease: int) -> float:
        """Remaining seconds granted; 0.0 when the lease has expired."""

    def lease_revoke(self, lease: int) -> None: ...

    def watch(self, prefix: str, from_revision: int, on_event: Callable[[WatchEvent], None]) -> Watch:
        """Every change of `prefix` with revision >= from_revision, in order, each once, from a thread of the store."""

    def close(self) -> None: ...


class Blobs(Protocol):
    """Named immutable byte strings under one root; names use "/" and never leave the root."""

    def read(self, name: str, *, bytes_max: int) -> bytes:
        """Raises FileNotFoundError; ElasticError when it is larger than `bytes_max`."""

    def read_range(self, name: str, offset: int, nbytes: int) -> bytes: ...

    def size(self, name: str) -> int: ...

    def put_if_absent(self, name: str, data: bytes) -> Outcome:
        """Durable and whole, or not there. CONFLICT when the name exists (with the same or another content)."""

    def replace(self, name: str, data: bytes) -> None:
        """Atomic replacement, for hints (HEAD) only."""

    def list(self, prefix: str) -> list[str]:
        """Names under `prefix`, sorted; temporary names are not shown."""


class BlobReader(Protocol):
    """One open blob: many ranges of it, read from several threads."""

    name: str
    nbytes: int
    block: int
    """Bytes that are best asked for at a time."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills `view`. Raises ElasticError when the blob ends before it is full."""

    def scatter_into(self, offset: int, views: Sequence[memoryview]) -> None:
        """The same for several buffers (at most 512) with consecutive bytes."""

    def close(self) -> None: ...


class PendingBlob(Protocol):
    """A blob being written under a name that nobody sees."""

    def write(self, view: memoryview | bytes) -> None: ...

    def publish(self, name: str, head: bytes = b"") -> None:
        """Durable and visible under `name`; an existing blob of that name is replaced (content names only).
        `head`: the bytes that were left out at the beginning, exactly as many as `create` was told."""

    def discard(self) -> None:
        """Forget it; idempotent, never raises."""


class StreamBlobs(Blobs, Protocol):
    """Blobs that can also be written and read in pieces: what packs need."""

    remote: bool
    """Each reading is a transfer of its own, also of what another process of the machine has just read."""

    def open(self, name: str) -> BlobReader:
        """Raises FileNotFoundError."""

    def create(self, *, head: int = 0) -> PendingBlob:
        """`head`: so many bytes at the beginning come last, with `publish`; what is written begins behind."""

    def point(self, name: str, target: str) -> None:
        """Let the name `name` show `target` to people (a symbolic link); a hint, nothing reads it back."""

    def delete(self, name: str) -> None:
        """Idempotent."""


@runtime_checkable
class AgingBlobs(StreamBlobs, Protocol):
    """Blobs whose age can be told, by the clock of whoever stores them: what garbage collection needs."""

    def now(self) -> float:
        """That clock: seconds; a blob that is written afterwards is not older."""

    def ages(self, prefix: str) -> dict[str, float]:
        """The names that `list` gives, with the seconds since each was written last."""

    def stamps(self, prefix: str) -> dict[str, str]:
        """The names that `list` gives, each with a text that differs when the blob was written again meanwhile."""

    def delete_older(self, name: str, older_s: float) -> int:
        """Removes the blob unless it is there no more, or was written less than `older_s` ago. Returns its bytes, or -1
        when it was not removed. For names that nobody writes again once they are old: what is written again, with
        the same bytes, just when it is removed may be lost on some storages."""

    def sweep(self, older_s: float) -> int:
        """Removes what writers that were killed left behind and nobody has touched for so long. How many."""


class Votes(Protocol):
    """The transport of one snapshot's two-phase commit among the ranks of a generation. Every call is bounded in time;
    a lost peer raises `VotesLost` on every rank that still waits."""

    rank: int
    world_size: int

    def gather(self, payload: bytes) -> list[bytes] | None:
        """All ranks call it; rank 0 gets the payloads by rank, the others None."""

    def broadcast(self, payload: bytes | None) -> bytes:
        """Rank 0 gives the payload, every rank gets it."""

    def swap(self, out: memoryview, to: int, into: memoryview, source: int, *, timeout_s: float) -> None:
        """Sends `out` to one rank while `into` is filled from another; both know the sizes. Nothing travels where a
        size is 0. Both are writable."""

    def channel(self, number: int) -> Votes:
        """A second conversation over the same transport, independent of this one (another thread may hold it)."""

    def leave(self) -> None:
        """This rank gives up: whoever waits for it, in any conversation, gets `VotesLost` now and not only at the
        bound. Nothing more can be said over this transport. Never raises."""


class VotesLost(Exception):
    """A peer died or did not answer within the bound: the snapshot is undecided here, settle it by reading."""
