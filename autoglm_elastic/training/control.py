"""The worker's end of the control channel: what the agent says, as flags to look at and events to wait for.

One daemon thread reads the channel. It sets flags and calls the breaker of the current generation; it must
never touch tensors, the user's objects or a process group other than through that breaker. When the agent is
gone the
process ends at once: a worker without an agent is an orphan.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from autoglm_elastic import wire
from autoglm_elastic.errors import PlatformError

SEND_LIMIT_S: Final = 10
"""An agent that takes nothing for so long is stuck; the message is dropped."""

STOP_WORLD_LIMIT_S: Final = 10.0
"""A stop that comes between two worlds is agreed on in the next, which is only moments away after a death. One that
does not come within this waits for nodes."""


class Control:
    """Thread safe. `breaker` is called on the control thread, at most once for each generation that
    breaks."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        channel.setblocking(True)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_LIMIT_S, 0))
        self._changed = threading.Condition()
        self._world: wire.World | None = None
        self._broken: tuple[int, str] = (-1, "")
        self._told_at = 0.0
        self._breaker: Callable[[], None] | None = None
        self._generation = -1
        self._met = False
        self.stop: wire.Stop | None = None
        self.waiting = False
        """In `wait_world`: there is no world to agree on a stop with."""

    @classmethod
    def connect(cls) -> Control | None:
        """The channel that the launcher gave us, with its thread running, or None without a launcher."""
        number = os.environ.get(wire.ENV_CONTROL_FD)
        if number is None:
            return None
        os.set_inheritable(int(number), False)
        control = cls(socket.socket(fileno=int(number)))
        threading.Thread(target=control._listen, name="autoglm-control", daemon=True).start()
        return control

    def send(self, message: wire.ToAgent) -> None:
        """Tell the agent; what it does not take within `SEND_LIMIT_S` is dropped (it notices our death
        anyway)."""
        with contextlib.suppress(OSError):
            self._channel.send(wire.encode(message))

    def enter(self, generation: int, breaker: Callable[[], None]) -> None:
        """`generation` is ours now. If it is broken already, `breaker` is called here."""
        with self._changed:
            self._generation, self._breaker, self._met = generation, breaker, False
            broken = self._broken[0] >= generation
        if broken:
            breaker()

    def met(self) -> None:
        """All ranks are in the generation, so that they can agree on a boundary to leave it at for a planned one.
        Before that some may have gone to the planned one at once, and whoever waits for them here would wait in
        vain."""
        with self._changed:
            self._met = True

    def leave(self) -> None:
        """Out of the generation's groups: nothing is left to break."""
        with self._changed:
            self._breaker, self._met = None, False

    def why_broken(self, generation: int) -> str | None:
        """The reason when `generation` is known to be broken, else None."""
        broken, reason = self._broken
        return reason if broken >= generation else None

    def told_at(self) -> float:
        """`time.monotonic()` of when we were told of the last change of world."""
        return self._told_at

    def next_world(self, generation: int) -> wire.World | None:
        """A newer world than `generation`, if one was announced that is not known to be broken."""
        world = self._world
        return world if world is not None and world.generation > max(generation, self._broken[0]) else None

    def wait_over(self, generation: int, limit_s: float) -> bool:
        """True when `generation` is known to be broken or to be followed by another within `limit_s`, or we are to
        stop: there is nobody left in it to agree on that with."""

        def is_over() -> bool:
            return self._broken[0] >= generation or self.next_world(generation) is not None or bool(self.stop)

        with self._changed:
            return self._changed.wait_for(is_over, limit_s)

    def wait_world(self, after: int, limit_s: float) -> wire.World:
        """The newest world, newer than generation `after`. Raises PlatformError when none comes within
        `limit_s`, SystemExit when we are to stop and none comes within STOP_WORLD_LIMIT_S: there is nobody to agree
        with, and the newest snapshot stays."""
        self.waiting = True
        try:
            with self._changed:
                self._changed.wait_for(
                    lambda: self.next_world(after) is not None or self.stop is not None, limit_s
                )
                if self.stop is not None:
                    stop_limit_s = min(limit_s, self.stop.deadline_s, STOP_WORLD_LIMIT_S)
                    self._changed.wait_for(lambda: self.next_world(after) is not None, stop_limit_s)
                world = self.next_world(after)
        finally:
            self.waiting = False
        if world is not None:
            return world
        if self.stop is not None:
            raise SystemExit(128 + self.stop.signal)
        raise PlatformError(
            f"the launcher announced no world after generation {after} within {limit_s:.0f} s",
            do="look at the launcher's log",
        )

    def _listen(self) -> None:
        while True:
            try:
                packet = self._channel.recv(wire.MESSAGE_BYTES_MAX)
            except InterruptedError:
                continue
            except OSError:
                packet = b""
            if not packet:
                os._exit(1)
            self._take(wire.decode_to_worker(packet))

    def _take(self, message: wire.ToWorker) -> None:
        breaker = None
        with self._changed:
            if isinstance(message, wire.Stop):
                self.stop = message
            else:
                ours = self._generation
                newer = (
                    isinstance(message, wire.World)
                    and message.generation > ours
                    and not (message.planned and self._met)
                )
                broken = message.generation if isinstance(message, wire.Break) else message.generation - 1
                if isinstance(message, wire.World):
                    self._world = message
                if (newer or isinstance(message, wire.Break)) and broken > self._broken[0]:
                    if self._broken[0] < ours <= broken:
                        breaker = self._breaker
                        self._told_at = time.monotonic()
                    self._broken = (broken, message.reason)
            self._changed.notify_all()
        if breaker is not None:
            breaker()
