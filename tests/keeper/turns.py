"""Threads that write at the same time, in an order that a seed decides: so that a crash test can be replayed."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoglm_elastic.catalog import failpoints, packs
from autoglm_elastic.keeper.job import Layout, PackImage
from autoglm_elastic.keeper.writer import Result, Work, Writer
from autoglm_elastic.ports import StreamBlobs
from tests.snapshot.disk_model import Recorder

TURN_S = 30.0
"""How long a thread waits for its turn: for ever, unless the test is broken."""


class Turns(Recorder):
    """Lets the threads that write packs make one call each time all of them wait for one."""

    def __init__(self, root: Path, seed: int) -> None:
        super().__init__(root)
        self._seed, self._rng = seed, random.Random(seed)
        self._named: collections.Counter[int] = collections.Counter()
        self._mine = threading.local()
        self._changed = threading.Condition()
        self._live = 0
        self._waiting: set[int] = set()
        self._next: int | None = None
        self.most_waiting = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        number = getattr(self._mine, "number", None)
        if number is not None:
            with self._changed:
                self._waiting.add(number)
                self._choose()
                if not self._changed.wait_for(lambda: self._next == number, TURN_S):
                    raise TimeoutError(f"pack {number} never had its turn")
                self._waiting.remove(number)
                self._next = None
        with self._lock:
            yield

    def token_hex(self, nbytes: int) -> str:
        """In the place of `secrets`' for the nonce of a pack, so that its name and folder follow from the seed, too."""
        number = self._mine.number
        self._named[number] += 1
        return hashlib.sha256(f"{self._seed} {number} {self._named[number]}".encode()).hexdigest()[
            : 2 * nbytes
        ]

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Names of packs come from here meanwhile."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packs, "secrets", self)
            yield

    def expect(self, threads: int) -> None:
        with self._changed:
            self._live = threads

    @contextlib.contextmanager
    def of(self, number: int) -> Iterator[None]:
        self._mine.number = number
        try:
            yield
        finally:
            self._mine.number = None
            with self._changed:
                self._live -= 1
                self._choose()

    def _choose(self) -> None:
        self.most_waiting = max(self.most_waiting, len(self._waiting))
        if self._waiting and len(self._waiting) == self._live and self._next is None:
            self._next = self._rng.choice(sorted(self._waiting))
            self._changed.notify_all()


class TurningWriter(Writer):
    """The keeper's writer; each of its packs waits for its turns."""

    def __init__(self, blobs: StreamBlobs, turns: Turns) -> None:
        super().__init__(blobs, failpoints.none)
        self._turns = turns

    def start(self, view: memoryview, layout: Layout, rank: int, on_done: Callable[[Result], None]) -> Work:
        self._turns.expect(len(layout))
        return super().start(view, layout, rank, on_done)

    def _pack(self, work: Work, number: int, image: PackImage) -> None:
        with self._turns.of(number):
            super()._pack(work, number, image)
