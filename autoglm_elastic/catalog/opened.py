"""The packs of one manifest, opened when first wanted: their readers, and the chunks that their headers list.

A header is compared with the name of its pack before anything in it is believed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence

from autoglm_elastic.catalog import packs
from autoglm_elastic.catalog.format import Chunk, Manifest, Pack, pack_path
from autoglm_elastic.errors import CorruptSnapshot
from autoglm_elastic.ports import BlobReader, StreamBlobs


class OpenPacks:
    """Thread safe. Close it (or use it in `with`) to close the files."""

    def __init__(self, blobs: StreamBlobs, manifest: Manifest) -> None:
        self._blobs, self._manifest = blobs, manifest
        self._readers: dict[int, BlobReader] = {}
        self._chunks: dict[int, Mapping[str, Sequence[Chunk]]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> OpenPacks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()

    def pack(self, number: int) -> Pack:
        """As the manifest lists it."""
        return self._manifest.packs[number]

    def reader(self, number: int) -> BlobReader:
        """Raises CorruptSnapshot for a pack that is missing or has another size."""
        with self._lock:
            if number not in self._readers:
                pack = self._manifest.packs[number]
                name = pack_path(pack.sha256)
                try:
                    reader = self._blobs.open(name)
                except FileNotFoundError as error:
                    raise CorruptSnapshot(f"{name} is missing") from error
                if reader.nbytes != pack.nbytes:
                    reader.close()
                    raise CorruptSnapshot(f"{name} has {reader.nbytes} bytes", valid=f"{pack.nbytes} bytes")
                self._readers[number] = reader
            return self._readers[number]

    def chunks(self, number: int) -> Mapping[str, Sequence[Chunk]]:
        """By tensor. Raises CorruptSnapshot for a header that is not the one the pack is named by."""
        known = self._chunks.get(number)
        if known is None:
            pack = self._manifest.packs[number]
            where = pack_path(pack.sha256)
            head = packs.read_head(self.reader(number), where)
            if len(head) != pack.head or hashlib.sha256(head).hexdigest() != pack.sha256:
                raise CorruptSnapshot(f"{where}: the SHA-256 of its header differs from its name")
            rows = packs.parse_head(head, pack.nbytes, where)
            known = packs.chunks_of(rows, self._manifest.tensors, number, where)
            self._chunks[number] = known
        return known

    def all_chunks(self) -> dict[str, list[Chunk]]:
        """Every chunk of the snapshot, by tensor, sorted by offsets."""
        every: dict[str, list[Chunk]] = {name: [] for name in self._manifest.tensors}
        for number in range(len(self._manifest.packs)):
            for name, chunks in self.chunks(number).items():
                every[name].extend(chunks)
        for chunks_ in every.values():
            chunks_.sort(key=lambda chunk: (chunk.offsets, chunk.sizes))
        return every
