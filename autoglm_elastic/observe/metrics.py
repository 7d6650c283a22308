"""The metrics of a run: one JSON line a committed step, written by rank 0 when the step after it commits.

A step that was redone after an incident appears again, with a newer generation: `lineage` keeps the newest of
each. May touch: one file, opened for appending. Must never: raise into the caller or stop training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from autoglm_elastic.observe import _lines

TAIL_BYTES: Final = 1 << 16


class Metric(msgspec.Struct, frozen=True):
    """One committed step. `loss`: the mean over the samples of the global batch; None when none was given, it
    was not finite, or those who knew it were lost (the mean over those who are left, when somebody is).
    `world_size` is that of the generation, 0 when unknown. `values`: whatever else rank 0 gave `job.commit`
    and `job.log`."""

    step: int
    generation: int
    wall_time: float
    loss: float | None = None
    world_size: int = 0
    values: dict[str, float] = {}


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Metric] = msgspec.json.Decoder(Metric)


class MetricLog:
    """Appends metrics to a file; one writer (rank 0); never raises: what could not be written is counted in
    `faults`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = _lines.LineFile(path)
        self.faults = 0

    def write(self, metric: Metric) -> None:
        """One `write` of one line. A loss that is not finite is written as null (JSON has no NaN)."""
        try:
            if metric.loss is not None and not math.isfinite(metric.loss):
                metric = msgspec.structs.replace(metric, loss=None)
            self._file.append(_encoder.encode(metric) + b"\n")
        except (OSError, TypeError, ValueError, msgspec.MsgspecError):
            self.faults += 1

    def close(self) -> None:
        """Idempotent."""
        self._file.close()


def parse_line(line: bytes) -> Metric | None:
    """The metric of one line, or None when it is torn or not one of ours."""
    return _lines.parse(line, _decoder)


def read(path: str | os.PathLike[str]) -> Iterator[Metric]:
    """All metrics in the order of the file. Torn lines and a file that is not there yet are passed over."""
    return _lines.read(path, parse_line)


def newest(path: str | os.PathLike[str]) -> Metric | None:
    """The last line of the file; None where there is none, or it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    return next((metric for line in reversed(lines) if (metric := parse_line(line)) is not None), None)


def lineage(metrics: Iterable[Metric]) -> list[Metric]:
    """The committed steps that count, by step: a generation replaces what older ones did from its first step
    on."""
    chain: list[Metric] = []
    for metric in sorted(metrics, key=lambda metric: (metric.generation, metric.step)):
        while chain and chain[-1].step >= metric.step:
            chain.pop()
        chain.append(metric)
    return chain
