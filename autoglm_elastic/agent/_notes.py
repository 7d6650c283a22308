"""What a node tells who looks at the job from outside, without the run directory: one small key under its lease.

Cheap whatever the number of nodes: all of them together write at most `NOTES_PER_S_MAX` a second, what has not changed
is not written again, and no agent watches the keys. It has a thread of its own, which may hang in the store and fail
as it likes: nothing waits for it. May touch: boards of the workers, for reading. Must never: stop training, or be
needed by it.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

import msgspec

from autoglm_elastic import wire
from autoglm_elastic.agent.session import NodeSession
from autoglm_elastic.agent.slots import WorkerSlot
from autoglm_elastic.coordination import SystemClock
from autoglm_elastic.observe.events import Event, IncidentClosed, IncidentOpened
from autoglm_elastic.observe.text import shortened

log = logging.getLogger(__name__)

PAUSE_S_MIN: Final = 2.0
"""Between two notes of a node."""

NOTES_PER_S_MAX: Final = 100.0
"""Of all nodes together: 4,096 nodes write each 41 seconds."""

RECENT_MAX: Final = 8
"""Incidents of each kind that a node remembers."""

REASON_CHARS_MAX: Final = 200
STOP_S_MAX: Final = 0.2
"""A note under way is not waited for: its thread is a daemon, and the store's calls are bounded."""


class Opened(msgspec.Struct, frozen=True):
    """Generation `broke` broke, as this node saw it."""

    broke: int
    wall_time: float
    reason: str


class Recovered(msgspec.Struct, frozen=True):
    """The first committed step of `generation`, told by the node of its rank 0."""

    generation: int
    wall_time: float
    step: int
    from_step: int
    tier: str


class Worker(msgspec.Struct, frozen=True):
    """What a worker has on its board. `elastic`: it runs `elastic.run`, and writes there."""

    local_rank: int
    pid: int
    state: str
    elastic: bool


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """One node. `step`, `loss`, `wall_time`: of its newest commit; `steps_per_s` since the note before, None when there
    was none in the same generation."""

    generation: int = 0
    step: int = -1
    loss: float | None = None
    snapshot_step: int = -1
    wall_time: float = 0.0
    steps_per_s: float | None = None
    workers: list[Worker] = []
    opened: list[Opened] = []
    recovered: list[Recovered] = []


class Recent:
    """The newest incidents that this node's agent has put on the log. Thread safe."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self.opened: deque[Opened] = deque(maxlen=RECENT_MAX)
        self.recovered: deque[Recovered] = deque(maxlen=RECENT_MAX)
        self.news = threading.Event()
        """Something that people wait for."""

    def take(self, event: Event) -> None:
        if isinstance(event, IncidentOpened):
            reason = shortened(event.reason, REASON_CHARS_MAX)
            self.opened.append(Opened(event.id, self._clock.wall(), reason))
        elif isinstance(event, IncidentClosed):
            wall, number = event.committed_wall_time, event.generation
            self.recovered.append(Recovered(number, wall, event.step, event.from_step, event.tier))
            self.news.set()


class Notes:
    """While inside, this node's note is kept current."""

    def __init__(self, session: NodeSession, slots: Sequence[WorkerSlot], recent: Recent) -> None:
        self._session, self._slots, self._recent = session, slots, recent
        self._left: Note | None = None
        self._lease_of_left = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="autoglm-notes", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._recent.news.set()
        self._thread.join(STOP_S_MAX)

    def _run(self) -> None:
        while True:
            last = self._stopping
            try:
                self._leave()
            except Exception as error:  # noqa: BLE001  whatever it is, training does not care
                log.debug("no note was left in the store: %s: %s", type(error).__name__, error)
            if last:
                return
            self._recent.news.wait(self._pause_s())
            self._recent.news.clear()

    def _pause_s(self) -> float:
        return max(PAUSE_S_MIN, len(self._session.members()) / NOTES_PER_S_MAX)

    def _leave(self) -> None:
        before, member = self._left, self._session.incarnation
        note = _note(self._slots, self._recent, before)
        if before is not None and member == self._lease_of_left:
            idle = note.wall_time == before.wall_time and not before.steps_per_s
            if idle and msgspec.structs.replace(note, steps_per_s=before.steps_per_s) == before:
                return
        self._session.leave_note(msgspec.to_builtins(note))
        self._left, self._lease_of_left = note, member


def _note(slots: Sequence[WorkerSlot], recent: Recent, before: Note | None) -> Note:
    workers, boards = [], []
    for slot in slots:
        board = slot.note()
        there = board is not None and (slot.alive or board.state is wire.RankState.DONE)
        state = board.state.name.lower() if board is not None and there else "dead"
        workers.append(Worker(slot.local_rank, slot.pid, state, slot.can_stay))
        if board is not None:
            boards.append(board)
    newest = max(boards, key=lambda board: (board.generation, board.step), default=None)
    opened, recovered = list(recent.opened), list(recent.recovered)
    if newest is None:
        return Note(workers=workers, opened=opened, recovered=recovered)
    return Note(
        generation=newest.generation,
        step=newest.step,
        loss=newest.loss if math.isfinite(newest.loss) else None,
        snapshot_step=max(board.snapshot_step for board in boards),
        wall_time=newest.wall_time,
        steps_per_s=_rate(newest, before),
        workers=workers,
        opened=opened,
        recovered=recovered,
    )


def _rate(newest: wire.BoardNote, before: Note | None) -> float | None:
    if before is None or before.generation != newest.generation or before.step < 0:
        return None
    elapsed_s = newest.wall_time - before.wall_time
    return round((newest.step - before.step) / elapsed_s, 3) if elapsed_s > 0 else 0.0
