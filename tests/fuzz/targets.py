"""Every parser of bytes that others may have written, with a document that it takes. Shared by the properties
(test_parsers.py) and the fuzzer (fuzz.py)."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import packs, prepared, tags, tree
from autoglm_elastic.catalog.decide import Request
from autoglm_elastic.convert.dcp_metadata import parse_metadata
from autoglm_elastic.core.commit import Snapshot
from autoglm_elastic.core.lineage import GenerationRecord
from autoglm_elastic.errors import CorruptSnapshot, UsageError
from autoglm_elastic.keeper import messages
from autoglm_elastic.keeper.job import LAYOUTS, check_layout
from tests.keeper.state import Share

WHERE = "some/file"
SNAPSHOT = Snapshot(7, 3)
SHARE = Share(tensors=2, elements=8)
SEGMENT_BYTES = 1 << 20


@dataclass(frozen=True)
class Target:
    """`parse` raises nothing but `errors`, and CorruptSnapshot and UsageError begin with `where`."""

    valid: bytes
    parse: Callable[[bytes], Any]
    where: str = WHERE
    errors: tuple[type[Exception], ...] = (CorruptSnapshot, UsageError)


class OneFile:
    """Blobs of which one is there, whatever it is called."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path, self.data = path, data

    def list(self, prefix: str) -> list[str]:
        return [self.path]

    def read(self, name: str, *, bytes_max: int) -> bytes:
        return self.data


class Bytes:
    """ports.BlobReader."""

    def __init__(self, data: bytes) -> None:
        self.data, self.nbytes = data, len(data)

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self.data[offset : offset + view.nbytes]


PREPARED = fmt.decode(SHARE.vote, fmt.Prepared, WHERE)
PACK = fmt.Pack("0" * 64, 8192, 4096, 0)
MANIFEST = fmt.Manifest(
    format="autoglm-snapshot",
    version=1,
    step=7,
    generation=3,
    world_size=1,
    packs=(PACK,),
    tensors=SHARE.structure.tensors,
    tree={
        "state": SHARE.structure.tree,
        "odd": {"$": "dict", "v": [[1, {"$": "tuple", "v": [{"$": "float", "v": "nan"}]}], [2, None]]},
        "big": [{"$": "int", "v": str(1 << 70)}, {"$": "bytes", "v": "AAAA"}, 0.5, True],
    },
    environment={"torch": "2"},
)
ENTRY = fmt.sealed(
    fmt.CatalogEntry(
        format="autoglm-snapshot",
        version=1,
        name=SNAPSHOT.entry,
        step=7,
        generation=3,
        manifest="0" * 64,
        manifest_bytes=100,
        kind="full",
        nbytes=8192,
        tensors=2,
        world_size=1,
        wall_time=1.5,
        metrics={"loss": 0.5},
        tags=("best",),
    )
)
RECORD = fmt.sealed(
    prepared.Record(
        step=7,
        generation=3,
        rank=0,
        world_size=1,
        prepared=msgspec.structs.replace(PREPARED, packs=(PACK,)),
        structure="0" * 64,
        wish=prepared.Wish.of(Request(SNAPSHOT)),
    )
)
RECORD_PATH = f"prepared/{SNAPSHOT.entry}/0.json"
TAG = fmt.sealed(tags.TagFile(name="best", entry=SNAPSHOT.entry, wall_time=1.5))
HEAD, _ = packs.fill(SHARE.plans[0].head, SHARE.plans[0].digests_at, b"a" * packs.DIGEST_CHARS)


def manifest(data: bytes) -> None:
    found = fmt.parse_manifest(data, ENTRY, WHERE)
    tree.check(found.tree, found.tensors, WHERE)
    tree.decode(found.tree, str, str)


def header(data: bytes) -> None:
    reader: Any = Bytes(data)
    head = packs.read_head(reader, WHERE)
    rows = packs.parse_head(head, len(head) + SHARE.plans[0].nbytes, WHERE)
    packs.chunks_of(rows, SHARE.structure.tensors, 0, WHERE)


def tag(data: bytes) -> None:
    blobs: Any = OneFile("tags/best.json", data)
    tags.Tags(blobs).all()


def record(data: bytes) -> None:
    blobs: Any = OneFile(RECORD_PATH, data)
    prepared.read(blobs, SNAPSHOT, 0)


def structure(data: bytes) -> None:
    blobs: Any = OneFile("", data)
    prepared.read_structure(blobs, SNAPSHOT.entry, hashlib.sha256(data).hexdigest())


def frames(data: bytes) -> None:
    heard = messages.Frames()
    heard.feed(data)
    while frame := heard.next():
        for decoder in (messages.REQUESTS, messages.REPLIES):
            try:
                decoder.decode(frame[0])
            except SAID:
                continue


def layout(data: bytes) -> None:
    check_layout(LAYOUTS.decode(data), SEGMENT_BYTES)


def metadata_pickle() -> bytes:
    from torch.distributed.checkpoint.metadata import Metadata

    return pickle.dumps(Metadata({}, {"a": ("a",)}, {}), protocol=4)


SAID = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""What the keeper takes for a malformed message."""
TARGETS = {
    "entry": Target(fmt.encode(ENTRY), lambda data: fmt.parse_entry(data, SNAPSHOT.entry, WHERE)),
    "generation": Target(
        fmt.generation_file(GenerationRecord(3, 2, 5, "000000000005-g2", "disk")),
        lambda data: fmt.parse_generation(data, 3, WHERE),
    ),
    "manifest": Target(fmt.encode(MANIFEST), manifest),
    "header": Target(HEAD, header),
    "tag": Target(fmt.encode(TAG), tag, "tags/best.json"),
    "prepared": Target(fmt.encode(RECORD), record, RECORD_PATH),
    "structure": Target(fmt.encode(SHARE.structure), structure, f"prepared/{SNAPSHOT.entry}/"),
    "vote": Target(SHARE.vote, lambda data: fmt.decode(data, fmt.Prepared, WHERE)),
    "details": Target(SHARE.details(SNAPSHOT), lambda data: fmt.decode(data, prepared.Details, WHERE)),
    "frames": Target(
        messages.frame(messages.Remember("0" * 64), b"raw") + messages.frame(messages.Told("a", {"b": 1.5})),
        frames,
        "a frame of",
        (messages.ProtocolError,),
    ),
    "layout": Target(msgspec.json.encode(SHARE.images), layout, "", (UsageError, *SAID)),
    "metadata": Target(metadata_pickle(), lambda data: parse_metadata(data, WHERE)),
}


def framed(data: bytes) -> bytes:
    """A header whose length word fits, so that what it says is looked at."""
    text = data[8:] + b" " * (-len(data) % 8)
    return struct.pack("<Q", len(text)) + text


def check(target: Target, data: bytes) -> bool:
    """Whether it was taken. Raises AssertionError for an error without the file's name; what is not the parser's word
    for bad input comes through."""
    try:
        target.parse(data)
    except target.errors as error:
        text = str(error)
        if target.where and ("\n" in text or not text.startswith(target.where)):
            raise AssertionError(f"not one line that names its file: {text!r}") from error
        return False
    return True


def canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        errors="replace"
    )


def resealed(data: bytes) -> bytes | None:
    """A document whose digest fits what it says now, so that more of it is looked at; None for what has none."""
    try:
        document = json.load(io.BytesIO(data))
        if not isinstance(document, dict) or "digest" not in document:
            return None
        document["digest"] = ""
        document["digest"] = hashlib.sha256(canonical(document)).hexdigest()
        return canonical(document)
    except (ValueError, RecursionError):
        return None
