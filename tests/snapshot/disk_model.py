"""A model of what a crash may leave on a disk, from the recorded calls of `LocalBlobs`.

POSIX promises little: the bytes of a file are safe after its fsync, a name is safe after the fsync of its
directory, and whatever is not safe may be lost or kept in any combination: every subset of a file's writes, the
last of them also in half; every subset of the names and of the new directories."""

from __future__ import annotations

import errno
import itertools
import math
import os
import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from autoglm_elastic.storage.files import Files

ENUMERATED_MAX = 6
"""So many unsafe things are tried in all combinations; beyond that a seeded sample is."""
SAMPLE = 24

T = TypeVar("T")


def subsets(things: Sequence[T], rng: random.Random) -> Iterator[tuple[T, ...]]:
    """Of the things in their order: all subsets, or the whole, nothing and a sample."""
    if len(things) <= ENUMERATED_MAX:
        choices: Iterable[Sequence[bool]] = itertools.product((True, False), repeat=len(things))
    else:
        some = [[rng.random() < 0.5 for _ in things] for _ in range(SAMPLE)]
        choices = [[True] * len(things), [False] * len(things), *some]
    for choice in choices:
        yield tuple(itertools.compress(things, choice))


@dataclass
class Inode:
    safe: bytes = b""
    unsafe: list[tuple[int, bytes]] = field(default_factory=list)
    link: str | None = None

    def versions(self, rng: random.Random) -> list[bytes]:
        """What its bytes may be after a crash."""
        found = []
        for kept in subsets(self.unsafe, rng):
            found.append(_written(self.safe, kept))
            if kept:
                offset, data = kept[-1]
                found.append(_written(self.safe, (*kept[:-1], (offset, data[: len(data) // 2]))))
        return list(dict.fromkeys(found))

    def sync(self) -> None:
        self.safe, self.unsafe = _written(self.safe, self.unsafe), []


def _written(data: bytes, writes: Iterable[tuple[int, bytes]]) -> bytes:
    image = bytearray(data)
    for offset, piece in writes:
        image.extend(bytes(max(0, offset + len(piece) - len(image))))
        image[offset : offset + len(piece)] = piece
    return bytes(image)


@dataclass(frozen=True)
class NameChange:
    """`name` in `directory` stands for `inode` from now on, or for nothing if that is None."""

    directory: str
    name: str
    inode: int | None


class Unsynced(Files):
    """For tests in which no machine crashes: what fsync promises is not waited for."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_directory(self, path: str) -> None:
        if not os.path.isdir(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


class Recorder(Unsynced):
    """Does what Files does and writes it down, one call after the other, whatever thread it comes from. `mark` notes
    a fact between two calls, like "committed 1"."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.log: list[tuple[Any, ...]] = []
        self._numbers = itertools.count()
        self._files: dict[int, int] = {}
        self._lock = threading.RLock()

    def turn(self) -> AbstractContextManager[Any]:
        """Held during a call and its entry in the log, so that their order is the same."""
        return self._lock

    def mark(self, fact: str) -> None:
        self.log.append(("mark", fact))

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        if not flags & os.O_CREAT:
            return super().open(path, flags, dir_fd=dir_fd)
        with self.turn():
            fd = super().open(path, flags, dir_fd=dir_fd)
            self._files[fd] = next(self._numbers)
            self.log.append(("create", path, self._files[fd]))
        return fd

    def close(self, fd: int) -> None:
        with self._lock:
            self._files.pop(fd, None)
            super().close(fd)

    def write(self, fd: int, view: memoryview, offset: int) -> int:
        with self.turn():
            count = super().write(fd, view, offset)
            self.log.append(("write", self._files[fd], offset, bytes(view[:count])))
        return count

    def fsync(self, fd: int) -> None:
        with self.turn():
            super().fsync(fd)
            self.log.append(("fsync", self._files[fd]))

    def fsync_directory(self, path: str) -> None:
        with self.turn():
            super().fsync_directory(path)
            self.log.append(("fsync_directory", path))

    def rename(self, source: str, target: str) -> None:
        with self.turn():
            super().rename(source, target)
            self.log.append(("rename", source, target))

    def link(self, source: str, target: str) -> None:
        with self.turn():
            super().link(source, target)
            self.log.append(("link", source, target))

    def symlink(self, text: str, path: str) -> None:
        with self.turn():
            super().symlink(text, path)
            self.log.append(("symlink", text, path, next(self._numbers)))

    def unlink(self, path: str) -> None:
        with self.turn():
            super().unlink(path)
            self.log.append(("unlink", path))

    def mkdir(self, path: str) -> None:
        with self.turn():
            super().mkdir(path)
            self.log.append(("mkdir", path))


@dataclass(frozen=True)
class Image:
    """Names below the root with their bytes, or the text of a link; and the facts that held before the
    crash."""

    files: frozenset[tuple[str, bytes | str]]
    facts: frozenset[str]

    def build(self, where: Path) -> None:
        where.mkdir()
        for name, content in self.files:
            path = where / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.symlink_to(content)
            else:
                path.write_bytes(content)


def images(log: list[tuple[Any, ...]], root: str, seed: int) -> Iterator[Image]:
    """What a crash after any prefix of the log may leave. Temporary files are left out: nothing reads
    them."""
    rng = random.Random(seed)
    for length in range(len(log) + 1):
        yield from _after(log[:length], root, rng)


def _after(log: list[tuple[Any, ...]], root: str, rng: random.Random) -> Iterator[Image]:
    inodes: dict[int, Inode] = {}
    now: dict[str, int] = {}
    safe_names: dict[str, int] = {}
    pending: list[NameChange] = []
    unsafe_dirs: set[str] = set()
    facts: set[str] = set()
    for kind, *rest in log:
        match kind:
            case "mark":
                facts.add(rest[0])
            case "create":
                inodes[rest[1]] = Inode()
                now[rest[0]] = rest[1]
            case "write":
                inodes[rest[0]].unsafe.append((rest[1], rest[2]))
            case "fsync":
                inodes[rest[0]].sync()
            case "rename" | "link":
                source, target = rest
                now[target] = now[source]
                pending.append(NameChange(os.path.dirname(target), target, now[source]))
                if kind == "rename":
                    del now[source]
                    pending.append(NameChange(os.path.dirname(source), source, None))
            case "symlink":
                text, path, number = rest
                inodes[number] = Inode(link=text)
                now[path] = number
            case "unlink":
                now.pop(rest[0], None)
                pending.append(NameChange(os.path.dirname(rest[0]), rest[0], None))
            case "mkdir":
                unsafe_dirs.add(rest[0])
            case "fsync_directory":
                for change in [change for change in pending if change.directory == rest[0]]:
                    _apply(safe_names, change)
                    pending.remove(change)
                unsafe_dirs -= {path for path in unsafe_dirs if os.path.dirname(path) == rest[0]}
    pending = [change for change in pending if not _temporary(change.name, root)]
    for kept in subsets(pending, rng):
        names = dict(safe_names)
        for change in kept:
            _apply(names, change)
        for lost in subsets(sorted(unsafe_dirs), rng):
            visible = {
                name: number
                for name, number in names.items()
                if not _temporary(name, root) and not any(name.startswith(f"{path}/") for path in lost)
            }
            yield from _contents(visible, inodes, root, frozenset(facts), rng)


def _contents(
    names: dict[str, int], inodes: dict[int, Inode], root: str, facts: frozenset[str], rng: random.Random
) -> Iterator[Image]:
    unsafe = sorted({number for number in names.values() if inodes[number].unsafe})
    may_be = [inodes[number].versions(rng) for number in unsafe]
    if math.prod(map(len, may_be)) <= 1 << ENUMERATED_MAX:
        choices: Iterable[Sequence[bytes]] = itertools.product(*may_be)
    else:
        choices = [[rng.choice(versions) for versions in may_be] for _ in range(SAMPLE)]
    for versions in choices:
        chosen = dict(zip(unsafe, versions, strict=True))
        files: set[tuple[str, bytes | str]] = set()
        for name, number in names.items():
            inode = inodes[number]
            content = inode.link if inode.link is not None else chosen.get(number, inode.safe)
            files.add((os.path.relpath(name, root), content))
        yield Image(frozenset(files), facts)


def _apply(names: dict[str, int], change: NameChange) -> None:
    if change.inode is None:
        names.pop(change.name, None)
    else:
        names[change.name] = change.inode


def _temporary(name: str, root: str) -> bool:
    return os.path.relpath(name, root).startswith("tmp")
