"""Snapshots of a training: what they cost it, how soon they are durable, what memory they take.

Rounds in which every contender has its turn, each beginning with another one; a window of training without a
snapshot has its turn like the others. Nothing is excluded from a window: it ends when its steps are done *and*
its snapshots are durable on all ranks."""

from __future__ import annotations

import gc
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from autoglm_elastic.bench.checkpoint import raw
from autoglm_elastic.bench.checkpoint.contenders import SAVERS, Contender, Pending, Saver, savers
from autoglm_elastic.bench.checkpoint.measure import (
    Processes,
    barrier,
    now,
    peak_memory,
    slowest,
)
from autoglm_elastic.bench.checkpoint.spec import Measures, Rows, Spec
from autoglm_elastic.bench.checkpoint.training import State, Training, local, nbytes_of, tensors_of
from autoglm_elastic.core.split import even
from autoglm_elastic.errors import PlatformError

Say = Callable[[str], None]

NONE: Final = "none"
"""The window without a snapshot."""
STEPS_FIRST: Final = 3
STEPS_MAX: Final = 60
STEPS_QUICK: Final = 4
SPARE: Final = 1.5
"""A window is so much longer than the slowest snapshot took in the warm-up, beside a single step."""
MEMORY_SNAPSHOTS: Final = 3


class Turns:
    """The contenders of one part, made once, with a number that rises for every snapshot."""

    def __init__(self, contenders: Iterable[Contender], folder: Path, training: Training | None) -> None:
        optimizer = training.optimizer if training else None
        self.savers = {one.name: one.make(folder / one.name, optimizer) for one in contenders}
        self.number = 0

    def next_number(self) -> int:
        self.number += 1
        return self.number

    def order(self, names: list[str], round_: int) -> list[str]:
        start = round_ % len(names)
        return names[start:] + names[:start]

    def tidy(self) -> None:
        """What the round wrote is removed, and the disk is quiet before the next one."""
        barrier()
        if dist.get_rank() == 0:
            for name, saver in self.savers.items():
                if not name.startswith("ours"):
                    shutil.rmtree(saver.folder, ignore_errors=True)
            os.sync()
        barrier()

    def close(self) -> None:
        for saver in self.savers.values():
            saver.close()


def turn(round_: int) -> str:
    """For a person; the first one is negative and warms up."""
    return f"round {round_ + 1}" if round_ >= 0 else "warm-up"


def add(rows: Rows, row: str, **values: float) -> None:
    measures: Measures = rows.setdefault(row, {})
    for name, value in values.items():
        measures.setdefault(name, []).append(value)


def during_training(spec: Spec, say: Say) -> Rows:
    """Stall, slowdown, durable and processor time of a snapshot while both cores train."""
    rows: Rows = {}
    training = Training(spec.options.mib, sharded=spec.part.endswith("sharded"))
    processes = Processes(spec.mark)
    turns = Turns(savers(quick=spec.options.quick), Path(spec.folder), training)
    copy = Copy(training.state, spec.part.endswith("sharded"))
    names = [NONE, *turns.savers]
    durable_s = 0.0
    for name, saver in turns.savers.items():
        took = check(training, turns, saver)
        durable_s = max(durable_s, took)
        say(f"warm-up: {name}, durable after {took:.2f} s, loads as it was at the boundary")
    turns.tidy()
    step_s = window(training, turns, NONE, STEPS_FIRST, processes)["wall_s"] / STEPS_FIRST
    most = STEPS_QUICK if spec.options.quick else STEPS_MAX
    steps = min(most, max(STEPS_FIRST, 1 + math.ceil(durable_s * SPARE / step_s)))
    say(f"a window has {steps} steps of {step_s:.2f} s and one snapshot")
    for round_ in range(spec.options.repeat):
        for name in turns.order(names, round_):
            one = window(training, turns, name, steps, processes)
            add(rows, name, **one)
            say(f"round {round_ + 1}: {name}, {one['wall_s']:.2f} s")
        add(rows, "memcpy", stall_s=copy.measure())
        turns.tidy()
    add(rows, NONE, steps=steps, step_s=step_s, state_bytes=nbytes_of(training.state))
    turns.close()
    return rows


def window(training: Training, turns: Turns, name: str, steps: int, processes: Processes) -> dict[str, float]:
    """`steps` of training; behind the first a snapshot, unless `name` is NONE. Each figure is that of the
    slowest rank."""
    saver = turns.savers.get(name)
    number = turns.next_number()
    gc.collect()
    barrier()
    cpu = processes.cpu_s()
    barrier()
    pending: Pending | None = None
    stall = trigger = 0.0
    begin = now()
    for step in range(steps):
        training.forward_backward()
        if pending is not None:
            before = now()
            pending.before_step()
            stall += now() - before
        hooks = training.optimize()
        stall += hooks if pending is not None else 0.0
        if step == 0 and saver is not None:
            trigger = now()
            pending = saver.save(number, training.state)
            stall += now() - trigger
    trained = now()
    durable = pending.durable_at() if pending is not None else trigger
    barrier()
    wall = now() - begin
    cpu = processes.cpu_s() - cpu
    wall, stall, durable, late, cpu = slowest(
        wall, stall, durable - trigger, max(0.0, durable - trained) if pending else 0.0, cpu
    )
    if saver is None:
        return {"wall_s": wall, "cpu_s": cpu}
    return {"wall_s": wall, "stall_s": stall, "durable_s": durable, "late_s": late, "cpu_s": cpu}


def check(training: Training, turns: Turns, saver: Saver) -> float:
    """What was saved is the state of the boundary, whatever the training did next. Raises PlatformError.

    Returns how long it took until it was durable, a first snapshot aside."""
    saver.save(turns.next_number(), training.state).durable_at()
    barrier()
    number = turns.next_number()
    expected = {name: local(tensor).clone() for name, tensor in tensors_of(training.state).items()}
    trigger = now()
    pending = saver.save(number, training.state)
    training.forward_backward()
    pending.before_step()
    training.optimize()
    (took,) = slowest(pending.durable_at() - trigger)
    for tensor in tensors_of(training.state).values():
        local(tensor).zero_()
    saver.load(number, training.state)
    wrong = [
        name
        for name, tensor in tensors_of(training.state).items()
        if not torch.equal(local(tensor), expected[name])
    ]
    if wrong:
        raise PlatformError(
            f"{type(saver).__name__} saved other values than those of the boundary: {wrong[:3]}"
        )
    barrier()
    return took


class Copy:
    """memcpy of what one rank stages into warm memory: the least that a copy can cost."""

    def __init__(self, state: State, sharded: bool) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self._pairs = []
        for tensor in tensors_of(state).values():
            source = local(tensor)
            if not sharded and source.dim():
                source = source[slice(*even(source.shape[0], world_size)[rank])]
            self._pairs.append((torch.zeros_like(source), source))

    def measure(self) -> float:
        for target, source in self._pairs:
            target.copy_(source)
        barrier()
        begin = now()
        for target, source in self._pairs:
            target.copy_(source)
        (took,) = slowest(now() - begin)
        return took


def standing_still(spec: Spec, say: Say) -> Rows:
    """From the trigger until it is durable, while the training waits; and the limits in the same rounds."""
    rows: Rows = {}
    training = Training(spec.options.mib, sharded=spec.part.endswith("sharded"))
    folder = Path(spec.folder)
    turns = Turns(savers(quick=spec.options.quick), folder, training)
    writes = {
        f"write-{'direct' if direct else 'cache'}-{files}": (files, direct)
        for direct in ((False, True) if spec.options.disk else (False,))
        for files in raw.FILES
    }
    memory = raw.warm_memory(nbytes_of(training.state) if dist.get_rank() == 0 else 1)
    raw.fill(memory, 0)
    copy = Copy(training.state, spec.part.endswith("sharded"))
    names = [*turns.savers, *writes, "memcpy"]
    for round_ in range(-1, spec.options.repeat):
        for name in turns.order(names, max(round_, 0)):
            if name == "memcpy":
                one = {"stall_s": copy.measure()}
            elif name in writes:
                one = {"durable_s": _raw_write(folder / name, memory, *writes[name])}
            else:
                training.step()
                one = _once(training, turns, turns.savers[name])
            if round_ >= 0:
                add(rows, name, **one)
            say(f"{turn(round_)}: {name}, {max(one.values()):.2f} s")
        turns.tidy()
    add(rows, "memcpy", state_bytes=nbytes_of(training.state))
    turns.close()
    return rows


def _raw_write(folder: Path, memory: torch.Tensor, files: int, direct: bool) -> float:
    took = 0.0
    if dist.get_rank() == 0:
        folder.mkdir()
        begin = now()
        raw.write(folder, memory, files=files, direct=direct)
        took = now() - begin
        shutil.rmtree(folder)
        os.sync()
    (took,) = slowest(took)
    return took


def _once(training: Training, turns: Turns, saver: Saver) -> dict[str, float]:
    barrier()
    trigger = now()
    pending = saver.save(turns.next_number(), training.state)
    stall = now() - trigger
    pending.before_step()
    stall, durable = slowest(stall, pending.durable_at() - trigger)
    return {"stall_s": stall, "durable_s": durable}


def memory_of_one(spec: Spec, say: Say) -> Rows:
    """The highest memory of all processes while one contender saves, above that of the training alone."""
    rows: Rows = {}
    training = Training(spec.options.mib, sharded=spec.part.endswith("sharded"))
    processes = Processes(spec.mark)
    for _ in range(STEPS_FIRST):
        training.step()
    gc.collect()
    barrier()
    with peak_memory(processes) as before:
        for _ in range(STEPS_FIRST):
            training.step()
        barrier()
    turns = Turns([SAVERS[spec.role]], Path(spec.folder), training)
    (saver,) = turns.savers.values()
    with peak_memory(processes) as during:
        for _ in range(MEMORY_SNAPSHOTS):
            pending = saver.save(turns.next_number(), training.state)
            training.forward_backward()
            pending.before_step()
            training.optimize()
            pending.durable_at()
            training.step()
            barrier()
    (peak,) = slowest(max(0, during[0] - before[0]))
    add(rows, spec.role, peak_bytes=peak)
    say(f"{spec.role}: {peak / 2**20:.0f} MiB above the training's own")
    turns.close()
    return rows
