"""What the agent knows of each of its workers: one slot per local rank.

A slot outlives the processes that fill it. It owns the agent's end of the control channel and the board;
both are made anew for every process, so nothing that a dead worker sent can be taken for its replacement's.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

import msgspec

from autoglm_elastic import wire


@dataclass(frozen=True, slots=True)
class WorkerEnds:
    """The file descriptors that a new worker inherits; close them in the agent once the worker has
    started."""

    control: socket.socket
    board_fd: int


class WorkerSlot:
    """One local rank.

    `can_stay`: its process runs `elastic.run` (it said Hello), or replaces one that did. `pending`: a generation
    that it was sent to and has not entered yet. `entered`: it is in a generation, not yet unwound. `step_max`: the
    newest committed step that any process of this slot noted.
    """

    def __init__(self, local_rank: int) -> None:
        self.local_rank = local_rank
        self.pid = 0
        self.exit_code: int | None = None
        self.can_stay = False
        self.pending: wire.World | None = None
        self.entered = False
        self.unwind_deadline: float | None = None
        self.done: wire.Done | None = None
        self.step_max = -1
        self._control: socket.socket | None = None
        self._board: wire.Board | None = None

    @property
    def alive(self) -> bool:
        return self.pid != 0 and self.exit_code is None

    @property
    def finished(self) -> bool:
        """Its process ended well: by exit code 0 or by an agreed stop, and not before its training was
        over."""
        if self.exit_code is None:
            return False
        return self.done is not None if self.can_stay else self.exit_code == 0

    @property
    def control_fd(self) -> int:
        return -1 if self._control is None else self._control.fileno()

    def open(self) -> WorkerEnds:
        """A fresh channel and board for the process about to start."""
        self.close()
        self._control, worker_end = wire.control_pair()
        self._control.setblocking(False)
        self._board = wire.Board.create()
        self.done = None
        self.exit_code = None
        self.unwind_deadline = None
        self.entered = False
        return WorkerEnds(worker_end, self._board.fd)

    def close(self) -> None:
        if self._board is not None:
            self.note()
            self._board.close()
            self._board = None
        if self._control is not None:
            self._control.close()
            self._control = None

    def send(self, message: wire.ToWorker) -> bool:
        """False when the worker is gone or does not read: its exit, or its unwind limit, will tell."""
        if self._control is None:
            return False
        try:
            self._control.send(wire.encode(message))
        except OSError:
            return False
        return True

    def receive(self) -> list[wire.ToAgent]:
        """Every packet that has arrived. A malformed one ends the channel: the worker is not ours to trust
        then."""
        messages: list[wire.ToAgent] = []
        while self._control is not None:
            try:
                packet = self._control.recv(wire.MESSAGE_BYTES_MAX)
            except BlockingIOError:
                break
            except OSError:
                packet = b""
            if not packet:
                self._drop_control()
                break
            try:
                messages.append(wire.decode_to_agent(packet))
            except msgspec.MsgspecError:
                self._drop_control()
        return messages

    def note(self) -> wire.BoardNote | None:
        """The newest note on the board, also after the worker's death."""
        note = None if self._board is None else self._board.read()
        if note is not None:
            self.step_max = max(self.step_max, note.step)
        return note

    def newest_step(self) -> int:
        """The newest committed step, -1 for none. From any thread: the board may be closed meanwhile."""
        with contextlib.suppress(ValueError):
            self.note()
        return self.step_max

    def _drop_control(self) -> None:
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.close()
            self._control = None
