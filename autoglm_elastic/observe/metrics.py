"""The metrics of a run: one JSON line a committed step, written by rank 0 of the generation.

A step that was redone after an incident appears again, with a newer generation: `lineage` keeps the newest of
each. May touch: one file, opened for appending. Must never: raise into the caller or stop training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec


class Metric(msgspec.Struct, frozen=True):
    """One committed step. `loss` is None when none was given or it was not finite. `world_size` is that of
    the generation, 0 when unknown. `values`: whatever else `job.commit` and `job.log` were given."""

    step: int
    generation: int
    wall_time: float
    loss: float | None = None
    world_size: int = 0
    values: dict[str, float] = {}


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Metric)


class MetricLog:
    """Appends metrics to a file; one writer (rank 0); never raises: what could not be written is counted in
    `faults`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._fd = -1
        self.faults = 0

    def write(self, metric: Metric) -> None:
        """One `write` of one line. A loss that is not finite is written as null (JSON has no NaN)."""
        try:
            if metric.loss is not None and not math.isfinite(metric.loss):
                metric = msgspec.structs.replace(metric, loss=None)
            line = _encoder.encode(metric) + b"\n"
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
                size = os.fstat(self._fd).st_size
                if size and os.pread(self._fd, 1, size - 1) != b"\n":
                    line = b"\n" + line
            if os.write(self._fd, line) != len(line):
                raise OSError(f"short write to {self._path}")
        except (OSError, TypeError, ValueError, msgspec.MsgspecError):
            self.faults += 1

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def parse_line(line: bytes) -> Metric | None:
    """The metric of one line, or None when it is torn or not one of ours."""
    try:
        return _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def read(path: str | os.PathLike[str]) -> Iterator[Metric]:
    """All metrics in the order of the file. Torn lines and a file that is not there yet are passed over."""
    try:
        file = open(path, "rb")  # noqa: SIM115  (a missing file is an answer, not an error)
    except FileNotFoundError:
        return
    with file:
        for line in file:
            metric = parse_line(line)
            if metric is not None:
                yield metric


def lineage(metrics: Iterable[Metric]) -> list[Metric]:
    """The committed steps that count, by step: a generation replaces what older ones did from its first step
    on."""
    chain: list[Metric] = []
    for metric in sorted(metrics, key=lambda metric: (metric.generation, metric.step)):
        while chain and chain[-1].step >= metric.step:
            chain.pop()
        chain.append(metric)
    return chain
