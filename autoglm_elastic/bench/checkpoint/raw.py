"""Plain input and output at the limit of the machine: memcpy, files through the page cache and past it, cold
files, digests. What every engine is measured against, and nothing of any engine."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
import xxhash

from autoglm_elastic.errors import PlatformError

BLOCK: Final = 8 << 20
"""One call to the kernel. A multiple of every device's sector and page."""
WAIT_S: Final = 300.0
FILES: Final = (1, 2, 4)
"""Files written or read at once, a thread each."""
COLD_FRACTION_MAX: Final = 0.01
_DROPS_MAX: Final = 5
_libc = ctypes.CDLL(None, use_errno=True)


def warm_memory(nbytes: int) -> torch.Tensor:
    """Whole pages (O_DIRECT needs that), `nbytes` rounded down, of which every one has been touched."""
    nbytes = max(nbytes // mmap.PAGESIZE, 1) * mmap.PAGESIZE
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).fill_(1)


def fill(memory: torch.Tensor, seed: int) -> None:
    """Bytes that neither compress nor repeat from one seed to the next."""
    words = memory[: memory.numel() // 8 * 8].view(torch.int64)
    words.random_(generator=torch.Generator().manual_seed(seed))


def view(memory: torch.Tensor) -> memoryview:
    array: Any = memory.numpy()
    return memoryview(array)


def _spans(nbytes: int, parts: int) -> list[tuple[int, int]]:
    """`parts` spans of whole blocks, the last with the rest."""
    blocks = nbytes // BLOCK
    edges = [blocks * part // parts * BLOCK for part in range(parts)] + [nbytes]
    return list(itertools.pairwise(edges))


def _at_once(tasks: Sequence[Callable[[], None]]) -> None:
    if len(tasks) == 1:
        tasks[0]()
        return
    with ThreadPoolExecutor(len(tasks)) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result(timeout=WAIT_S)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write(folder: Path, memory: torch.Tensor, *, files: int, direct: bool) -> None:
    """All of `memory` into `files` new files below `folder`, durable with their names when this returns."""
    data = view(memory)

    def one(number: int, start: int, stop: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with _opened(folder / f"raw{number}", flags | (os.O_DIRECT if direct else 0)) as descriptor:
            _write_all(descriptor, data[start:stop])
            os.fsync(descriptor)

    spans = enumerate(_spans(len(data), files))
    _at_once([lambda number=number, span=span: one(number, *span) for number, span in spans])  # type: ignore[misc]
    sync_folder(folder)


def _write_all(descriptor: int, data: memoryview) -> None:
    at = 0
    while at < len(data):
        at += os.write(descriptor, data[at : at + BLOCK])


def sync_file(path: Path) -> None:
    """The file's bytes, and its name in its folder."""
    with _opened(path, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    with _opened(folder, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)


def read(path: Path, memory: torch.Tensor, *, threads: int, direct: bool, offset: int = 0) -> None:
    """`memory.numel()` bytes of one file from `offset` (of whole pages) on, by `threads` that take a span each."""
    data = view(memory)

    def one(start: int, stop: int) -> None:
        with _opened(path, os.O_RDONLY | (os.O_DIRECT if direct else 0)) as descriptor:
            at = start
            while at < stop:
                got = os.preadv(descriptor, [data[at : min(at + BLOCK, stop)]], offset + at)
                if got == 0:
                    raise PlatformError(f"{path} is shorter than it was written")
                at += got

    _at_once([lambda span=span: one(*span) for span in _spans(len(data), threads)])  # type: ignore[misc]


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def make_cold(folder: Path) -> float:
    """Drop all files below `folder` from the page cache. The part of them that is still there (0 to 1)."""
    files = files_below(folder)
    left = 1.0
    for _ in range(_DROPS_MAX):
        for path in files:
            with _opened(path, os.O_RDONLY) as descriptor:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        left = cached_fraction(files)
        if left <= COLD_FRACTION_MAX:
            break
    return left


def make_warm(folder: Path) -> float:
    """Read all files below `folder` once. The part of them that is in the page cache then."""
    block = bytearray(BLOCK)
    files = files_below(folder)
    for path in files:
        with _opened(path, os.O_RDONLY) as descriptor:
            while os.readv(descriptor, [block]):
                continue
    return cached_fraction(files)


def cached_fraction(files: Sequence[Path]) -> float:
    """By mincore(2), over all pages of `files`."""
    pages = cached = 0
    for path in files:
        with _opened(path, os.O_RDONLY) as descriptor:
            size = os.fstat(descriptor).st_size
            if size == 0:
                continue
            with mmap.mmap(
                descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            ) as mapped:
                count = -(-size // mmap.PAGESIZE)
                table = (ctypes.c_ubyte * count)()
                anchor = ctypes.c_char.from_buffer(mapped)
                try:
                    result = _libc.mincore(
                        ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), table
                    )
                finally:
                    del anchor
                if result != 0:
                    raise PlatformError(f"mincore of {path}: {os.strerror(ctypes.get_errno())}")
                pages += count
                cached += sum(byte & 1 for byte in bytes(table))
    return cached / pages if pages else 0.0


def sha256(memory: torch.Tensor, threads: int) -> None:
    data = view(memory)
    spans = _spans(len(data), threads)
    _at_once([lambda span=span: _digest(data[slice(*span)]) for span in spans])  # type: ignore[misc]


def _digest(data: memoryview) -> None:
    hashlib.sha256(data).digest()


def xxh3(memory: torch.Tensor) -> None:
    xxhash.xxh3_128(view(memory)).digest()
