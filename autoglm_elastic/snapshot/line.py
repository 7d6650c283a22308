"""This process' line to the keeper of its node, opened when something is first staged, and again when it was
lost. Where no keeper can be had, its work is done here (`keeper.InProcess`), and an event says so."""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

from autoglm_elastic.catalog import failpoints
from autoglm_elastic.catalog.failpoints import Failpoints
from autoglm_elastic.catalog.index import OnEvent, no_event
from autoglm_elastic.errors import ElasticError, PlatformError
from autoglm_elastic.keeper import InProcess, Keeper, open_keeper
from autoglm_elastic.ports import StreamBlobs
from autoglm_elastic.settings import Keeper as KeeperSettings
from autoglm_elastic.settings import load
from autoglm_elastic.storage import open_blobs


class _Place(NamedTuple):
    rank: int
    world_size: int
    generation: int


class Line:
    """One per process and run directory; it can serve one manager after the other.

    Args:
        place: the run directory, or its blobs: then, and with a `failpoint`, no keeper is asked.
        settings: None for those of the environment.
        on_event: called with (name, fields).
    """

    def __init__(
        self,
        place: str | os.PathLike[str] | StreamBlobs,
        *,
        settings: KeeperSettings | None = None,
        on_event: OnEvent = no_event,
        failpoint: Failpoints = failpoints.none,
    ) -> None:
        url = os.fspath(place) if isinstance(place, str | os.PathLike) else None
        self._url = url if failpoint is failpoints.none else None
        self.blobs: StreamBlobs = open_blobs(place) if isinstance(place, str | os.PathLike) else place
        self._settings, self._on_event, self._failpoint = settings, on_event, failpoint
        self._lock = threading.Lock()
        """Held for moments; whoever opens the line holds `_connecting` beside it, for as long as that takes."""
        self._connecting = threading.Lock()
        self._closed = 0
        """How often."""
        self._place = _Place(0, 1, 0)
        self._keeper: Keeper | InProcess | None = None

    def enter(self, *, rank: int, world_size: int, generation: int) -> None:
        """What is staged from now on is of this rank of this generation. Waits for nobody, also while a keeper is
        being started or does not answer."""
        with self._lock:
            self._place = _Place(rank, world_size, generation)
            if self._keeper is not None:
                self._keeper.enter(rank=rank, world_size=world_size, generation=generation)

    def known(self) -> Keeper | InProcess | None:
        """The keeper that the line is open to, if it is. Waits for nobody."""
        with self._lock:
            return None if self._keeper is None or self._keeper.gone else self._keeper

    def open(self) -> Keeper | InProcess:
        """Waits for a keeper that is being started, or does not answer: not for the training's thread. Raises
        ElasticError."""
        with self._connecting:
            with self._lock:
                if self._keeper is not None and not self._keeper.gone:
                    return self._keeper
                place, closed = self._place, self._closed
            keeper = self._connect(place)
            with self._lock:
                if closed == self._closed:
                    if place != self._place:
                        rank, world_size, generation = self._place
                        keeper.enter(rank=rank, world_size=world_size, generation=generation)
                    self._keeper = keeper
                    return keeper
            keeper.close()
            raise PlatformError("the line to the keeper was closed while it was opened")

    def _connect(self, place: _Place) -> Keeper | InProcess:
        if self._url is None:
            return InProcess(
                self.blobs, rank=place.rank, world_size=place.world_size, failpoint=self._failpoint
            )
        return open_keeper(
            self._url,
            self.blobs,
            rank=place.rank,
            world_size=place.world_size,
            generation=place.generation,
            settings=self._settings or load(environ=os.environ).settings.keeper,
            on_told=self._on_event,
        )

    def settle(self, timeout_s: float) -> bool:
        """Waits until the keeper has finished what dead ranks of this node left, if there is a keeper. False
        when that takes longer."""
        with self._lock:
            if self._keeper is None and (self._url is None or not Keeper.listens(self._url)):
                return True
        try:
            return self.open().settle(timeout_s)
        except ElasticError:
            return False

    def close(self) -> None:
        """Idempotent. A keeper finishes what it has in flight."""
        with self._lock:
            keeper, self._keeper = self._keeper, None
            self._closed += 1
        if keeper is not None:
            keeper.close()
