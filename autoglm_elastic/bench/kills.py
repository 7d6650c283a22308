"""Kill a worker of a running job and watch what the job makes of it.

`Recovery` is pure: it is fed the lines that the training reports and says when the job is back. A *new* step
is one that no worker had reached before the kill, done in a later life of the job; what a survivor finishes
of the step that was under way counts as reached.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass, field
from typing import Final

from autoglm_elastic.bench.jobs import Job, Mode, age_s
from autoglm_elastic.bench.steplog import Line
from autoglm_elastic.errors import PlatformError

HANG_S: Final = 60.0
"""No new step for so long after a kill, or at the start, is a hang."""
SAVE_EVERY: Final = 10
"""As in `scripts/mlp_ddp.py`. What a kill costs depends on how many steps ago the last file was saved, so a kill
is asked for at a position in that interval: the same ones for every mode, or the comparison would be one of luck."""


@dataclass(slots=True)
class Recovery:
    """After a kill at `killed_ns`, in life `life`, of a job of `workers` ranks that had reached step
    `reached`."""

    killed_ns: int
    life: int
    reached: int
    workers: int
    first_step: int | None = None
    new_step_ns: int | None = None
    full_world_ns: int | None = None
    back_ns: int | None = None
    last_life: int = 0
    _done: dict[int, dict[int, int]] = field(default_factory=dict)
    _new: dict[int, dict[int, int]] = field(default_factory=dict)

    def feed(self, line: Line) -> None:
        """Ranks that write at the same time may be read in the other order: what counts is when they wrote."""
        if line.what != "step":
            return
        if line.life <= self.life:
            self.reached = max(self.reached, line.step)
            return
        self.last_life = max(self.last_life, line.life)
        if self.first_step is None:
            self.first_step = line.step
        done = self._done.setdefault(line.life, {})
        done.setdefault(line.rank, line.wall_ns)
        if self.full_world_ns is None and len(done) == self.workers:
            self.full_world_ns = max(done.values())
        if line.step > self.reached:
            self.new_step_ns = min(line.wall_ns, self.new_step_ns or line.wall_ns)
            new = self._new.setdefault(line.life, {})
            new.setdefault(line.rank, line.wall_ns)
            if self.back_ns is None and len(new) == self.workers:
                self.back_ns = max(new.values())

    @property
    def redone(self) -> int:
        """Steps that were done twice."""
        return 0 if self.first_step is None else max(0, self.reached + 1 - self.first_step)


@dataclass(frozen=True, slots=True)
class Kill:
    """What one kill cost, in seconds; None where it never came. `back_s`: a new step done by every rank of
    the full world. `tries`: lives of the job that it took. `joined_s`: from the start of a replacement's
    process to its first collective (torchrun's script) or its first step (the elastic one)."""

    mode: str
    new_step_s: float | None
    full_world_s: float | None
    back_s: float | None
    redone: int
    tries: int
    joined_s: tuple[float, ...]
    end: str

    @property
    def hung(self) -> bool:
        return self.end != "back"


class Stuck(PlatformError):
    """The job is not making steps: it hangs or has ended."""


class Trial:
    """A job whose workers are killed again and again. Raises Stuck when it does not start."""

    def __init__(self, mode: Mode, workers: int, dice: random.Random, *, width: int | None = None) -> None:
        self.job = Job(mode, workers, width=width)
        self._dice = dice
        self._latest: dict[int, Line] = {}
        self._seen: set[int] = set()
        try:
            self._run_on(1)
        except BaseException:
            self.job.stop()
            raise

    def kill(self, position: int) -> Kill:
        """SIGKILL a random worker at a step that is `position` steps past a multiple of `SAVE_EVERY`; returns when the
        full world has done a new step, or gave up (`end`).

        Raises Stuck when the job does not go on before that.
        """
        now = max((line.step for line in self._latest.values()), default=0)
        self._run_on(1 + (position - now - 1) % SAVE_EVERY)
        pidfd = self._victim()
        recovery = Recovery(
            killed_ns=time.time_ns(),
            life=max(line.life for line in self._latest.values()),
            reached=max(line.step for line in self._latest.values()),
            workers=self.job.workers,
        )
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        joined: list[float] = []
        end = "back"
        deadline = time.monotonic() + HANG_S
        while recovery.back_ns is None:
            line = self.job.line(deadline)
            if line is None:
                end = "ended" if self.job.ended else "hung"
                break
            before = recovery.new_step_ns
            recovery.feed(line)
            if before is None and recovery.new_step_ns is not None:
                deadline = time.monotonic() + HANG_S
            if line.life > recovery.life:
                self._latest[line.rank] = line
            if line.pid not in self._seen:
                self._seen.add(line.pid)
                age = age_s(line.pid, line.wall_ns)
                joined += [] if age is None else [age]
        return Kill(
            mode=self.job.mode.name,
            new_step_s=_since(recovery.killed_ns, recovery.new_step_ns),
            full_world_s=_since(recovery.killed_ns, recovery.full_world_ns),
            back_s=_since(recovery.killed_ns, recovery.back_ns),
            redone=recovery.redone,
            tries=recovery.last_life - recovery.life,
            joined_s=tuple(joined),
            end=end,
        )

    def _victim(self) -> int:
        """A pidfd of a random worker. One that is gone already is a restart that the job began by itself."""
        while True:
            try:
                return os.pidfd_open(self._latest[self._dice.choice(sorted(self._latest))].pid)
            except ProcessLookupError:
                self._run_on(1)

    def stop(self) -> None:
        self.job.stop()

    def _run_on(self, steps: int) -> None:
        """Until every rank has made `steps` more."""
        target: int | None = None
        while target is None or any(line.step < target for line in self._latest.values()):
            line = self.job.line(time.monotonic() + HANG_S)
            if line is None:
                raise Stuck(self.job.why())
            self._seen.add(line.pid)
            if line.what == "step":
                self._latest[line.rank] = line
            if target is None and len(self._latest) == self.job.workers:
                target = max(line.step for line in self._latest.values()) + steps


def _since(start_ns: int, end_ns: int | None) -> float | None:
    return None if end_ns is None else (end_ns - start_ns) / 1e9
