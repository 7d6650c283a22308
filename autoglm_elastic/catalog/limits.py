"""Every cap of the snapshot format and its machinery, with its reason. Enforced when written and when
read."""

from __future__ import annotations

from typing import Final

FORMAT_NAME: Final = "autoglm-snapshot"
FORMAT_VERSION: Final = 1

ENTRY_BYTES_MAX: Final = 64 << 10
"""A catalog entry or generation record: small, read by the hundred."""
MANIFEST_BYTES_MAX: Final = 256 << 20
"""Holds about two million chunks; decoding takes a few times that in memory."""
HEADER_BYTES_MAX: Final = 64 << 20
"""A pack's safetensors header; below the 100 MB that the safetensors library accepts."""
ENTRIES_MAX: Final = 100_000
"""Catalog entries looked at in one directory."""
ENTRIES_KEPT_MAX: Final = 20_000
"""Decoded entries kept in memory, about a kilobyte each."""
TAGS_MAX: Final = 1000
"""Tags are for people."""

TENSORS_MAX: Final = 1_000_000
CHUNKS_MAX: Final = 4_000_000
PACKS_MAX: Final = 100_000
DIMS_MAX: Final = 32
NAME_BYTES_MAX: Final = 1024
"""A tensor's name (a path in the state, joined by dots)."""
TREE_DEPTH_MAX: Final = 64
"""Nesting of the state's structure; far below Python's recursion limit."""
TREE_TEXT_MAX: Final = 16 << 20
"""One string or bytes value inside the structure: larger data belongs in a tensor."""
SIZE_MAX: Final = 1 << 60
"""Any extent, offset or byte count: products of two still fit in Python's fast range and are checked against
files."""

CHUNK_BYTES: Final = 32 << 20
"""Target size of a chunk, the unit of verification: what a reader of one element has to read at least."""
PACK_BYTES: Final = 256 << 20
"""Target size of a pack: several are written at the same time, which is where a disk's speed comes from."""
PACK_CHUNKS_MAX: Final = 100_000
"""Keeps a pack's header far below HEADER_BYTES_MAX."""
SPLIT_BYTES_MIN: Final = 1 << 20
"""Replicated tensors below this are written whole by one rank instead of being split by rows."""

READ_THREADS_MAX: Final = 4
"""Threads that read and verify chunks; extra memory is at most one chunk each."""
IN_FLIGHT_MAX: Final = 1
"""Snapshots staged but not decided, per rank."""
CLOSE_S: Final = 30.0
"""How long `CheckpointManager.close` waits for the snapshot in flight, unless told otherwise."""
VOTE_S: Final = 600.0
"""How long a rank waits for another's vote: covers the slowest rank's writing, not a network round trip."""
VOTE_BYTES_MAX: Final = 256 << 20
"""One vote: the chunk table of one rank."""
COMMIT_S_MAX: Final = 3000.0
"""From before a snapshot's first durable pack to its catalog entry, by the storage's clock; far above VOTE_S. What is
older is not committed (catalog/decide.py)."""
PREPARE_S_MAX: Final = 3600.0
"""Garbage collection takes a file that nothing reaches no earlier than this. Above COMMIT_S_MAX by more than the clocks
of hosts may differ where files get their times from these; a collection that waits for less needs the directory for
itself."""
GRACE_S: Final = 7200.0
"""What nothing reaches is removed this long after it was written, and the packs of a snapshot this long after its
entry: longer than a prepare or a load may take."""
RETIRED_MAX: Final = 100
"""Entries that one pass of garbage collection takes out of the catalog."""
REMOVALS_MAX: Final = 10_000
"""Files that one pass removes; the next pass goes on."""
CHUNK_READ_BYTES_MAX: Final = 1 << 30
"""The largest chunk that a reader takes into memory of its own; writers stay at CHUNK_BYTES."""
