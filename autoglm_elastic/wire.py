"""Every name that crosses a process boundary: environment variables, control messages, the board.

The control channel is a SOCK_SEQPACKET socket pair between an agent and each of its workers: one packet, one JSON
object with an `op`. The board is one page of shared memory per worker in which the worker notes its progress without a
system call; the agent reads it whenever it wants to, also after the worker's death.
"""

from __future__ import annotations

import enum
import mmap
import os
import socket
import struct
from dataclasses import dataclass
from typing import Final

import msgspec

MESSAGE_BYTES_MAX: Final = 64 * 1024
"""A control message is small; a larger one is a bug and is refused by the sender."""

ENV_CONTROL_FD: Final = "AUTOGLM_CONTROL_FD"
ENV_BOARD_FD: Final = "AUTOGLM_BOARD_FD"
ENV_RUN_DIR: Final = "AUTOGLM_RUN_DIR"
ENV_RUN_ID: Final = "AUTOGLM_RUN_ID"
ENV_GENERATION: Final = "AUTOGLM_GENERATION"
ENV_NODE: Final = "AUTOGLM_NODE"
"""The node's name, by which a worker finds its keeper."""
ENV_SETTINGS: Final = "AUTOGLM_SETTINGS"
"""The settings tree as JSON, for the worker."""


class World(msgspec.Struct, frozen=True, tag_field="op", tag="world"):
    """Agent → worker: the generation to train in. `planned`: leave the current one at an agreed step boundary;
    otherwise the current one is broken, unwind now. The first message of every worker."""

    generation: int
    parent: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    group_rank: int
    group_world_size: int
    role_rank: int
    role_world_size: int
    master_addr: str
    master_port: int
    restart_count: int
    planned: bool
    reason: str


class Break(msgspec.Struct, frozen=True, tag_field="op", tag="break"):
    """Agent → worker: generation `generation` is broken; break its collectives and unwind. A `World` follows."""

    generation: int
    reason: str


class Stop(msgspec.Struct, frozen=True, tag_field="op", tag="stop"):
    """Agent → worker: agree with the others on a step boundary, snapshot, leave with exit code 75."""

    signal: int
    deadline_s: float


class Hello(msgspec.Struct, frozen=True, tag_field="op", tag="hello"):
    """Worker → agent: this process runs `elastic.run`; it can stay when the world changes."""

    pid: int


class Unwound(msgspec.Struct, frozen=True, tag_field="op", tag="unwound"):
    """Worker → agent: out of the user's function and of the groups of `generation`, ready for the next world."""

    generation: int


class Entered(msgspec.Struct, frozen=True, tag_field="op", tag="entered"):
    """Worker → agent: it takes part in `generation` from here on. Until then nobody there knows of the process: if it
    dies, another can take its place in the same generation."""

    generation: int


class Stranded(msgspec.Struct, frozen=True, tag_field="op", tag="stranded"):
    """Worker → agent: a peer in `generation` is gone, and nobody has said why. Wants out, and keeps its state."""

    generation: int
    reason: str


class Resumed(msgspec.Struct, frozen=True, tag_field="op", tag="resumed"):
    """Worker → agent: the first committed step in `generation`. `phases_s`: seconds by phase of the recovery.
    `step`: the step just committed; `from_step`: where the plan resumed; `tier`: live, disk or fresh."""

    generation: int
    step: int
    from_step: int
    tier: str
    reason: str
    wall_time: float
    phases_s: dict[str, float]


class Event(msgspec.Struct, frozen=True, tag_field="op", tag="event"):
    """Worker → agent: something for the event log (names and fields: `autoglm_elastic.observe.events`)."""

    name: str
    fields: dict[str, object]


class Done(msgspec.Struct, frozen=True, tag_field="op", tag="done"):
    """Worker → agent: the user's function returned (`requeue`: it left early on a stop, with a durable snapshot)."""

    generation: int
    step: int
    requeue: bool = False


ToWorker = World | Break | Stop
ToAgent = Hello | Unwound | Entered | Stranded | Resumed | Event | Done

_encoder = msgspec.json.Encoder()
_to_worker: msgspec.json.Decoder[ToWorker] = msgspec.json.Decoder(ToWorker)
_to_agent: msgspec.json.Decoder[ToAgent] = msgspec.json.Decoder(ToAgent)


def encode(message: ToWorker | ToAgent) -> bytes:
    """One packet. Raises ValueError when it is larger than `MESSAGE_BYTES_MAX`."""
    data = _encoder.encode(message)
    if len(data) > MESSAGE_BYTES_MAX:
        raise ValueError(f"control message of {len(data)} bytes; at most {MESSAGE_BYTES_MAX}")
    return data


def decode_to_worker(packet: bytes) -> ToWorker:
    return _to_worker.decode(packet)


def decode_to_agent(packet: bytes) -> ToAgent:
    return _to_agent.decode(packet)


def control_pair() -> tuple[socket.socket, socket.socket]:
    """(agent's end, worker's end), neither inheritable: the worker's end is passed by number."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class RankState(enum.IntEnum):
    """What a worker is doing, as it notes it on its board."""

    STARTING = 0
    WAITING = 1
    RUNNING = 2
    RECOVERING = 3
    DONE = 4


@dataclass(frozen=True, slots=True)
class BoardNote:
    """`step`: the newest committed step, -1 before the first. `snapshot_step`: the newest committed snapshot, or -1.
    `loss` is NaN when none was given. `wall_time`: of that commit, seconds since the epoch."""

    pid: int
    state: RankState
    generation: int
    step: int
    snapshot_step: int
    loss: float
    wall_time: float


class Board:
    """One page of shared memory: written by the worker (no system call, no lock), read by the agent.

    A sequence number that is odd while the page is being written lets a reader detect a torn read.
    """

    _LAYOUT = struct.Struct("<Qqqqqqqdd")
    _SEQUENCE = struct.Struct("<Q")
    NBYTES: Final = mmap.PAGESIZE

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._page = mmap.mmap(fd, self.NBYTES)
        self._sequence = int(self._SEQUENCE.unpack_from(self._page)[0])

    @classmethod
    def create(cls) -> Board:
        fd = os.memfd_create("autoglm-board", os.MFD_CLOEXEC)
        os.ftruncate(fd, cls.NBYTES)
        board = cls(fd)
        board.write(BoardNote(0, RankState.STARTING, 0, -1, -1, float("nan"), 0.0))
        return board

    def write(self, note: BoardNote) -> None:
        self._SEQUENCE.pack_into(self._page, 0, self._sequence + 1)
        self._LAYOUT.pack_into(
            self._page,
            0,
            self._sequence + 1,
            note.pid,
            int(note.state),
            note.generation,
            note.step,
            note.snapshot_step,
            0,
            note.loss,
            note.wall_time,
        )
        self._sequence += 2
        self._SEQUENCE.pack_into(self._page, 0, self._sequence)

    def read(self) -> BoardNote | None:
        """The last note, or None when the writer died in the middle of one."""
        for _ in range(64):
            before = self._SEQUENCE.unpack_from(self._page)[0]
            _, pid, state, generation, step, snapshot_step, _, loss, wall = self._LAYOUT.unpack_from(
                self._page
            )
            if before % 2 == 0 and self._SEQUENCE.unpack_from(self._page)[0] == before:
                return BoardNote(pid, RankState(state), generation, step, snapshot_step, loss, wall)
        return None

    def close(self) -> None:
        self._page.close()
        os.close(self.fd)
