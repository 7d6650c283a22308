"""`RUN/metrics.jsonl`: which steps committed, and what their metrics were. Rank 0 writes it.

From a thread of its own, so that logging never makes training wait or fail: what its queue cannot take is
dropped and counted. Rank 0 may die with a line that it had not written, so every rank keeps its last few and
tells them when the next generation begins; its rank 0 writes those that are not in the file.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from autoglm_elastic.observe.events import METRICS_NAME
from autoglm_elastic.observe.metrics import Metric, MetricLog, newest
from autoglm_elastic.training.rows import Row, Rows, Told

QUEUE_MAX: Final = 4096
"""Steps that may wait to be written; a disk that is further behind loses lines, not time."""

CLOSE_LIMIT_S: Final = 5.0

PAUSED_S: Final = 1.5
"""A line that reaches its idle thread so late was held up with the whole process. Meanwhile the others may have counted
it as dead and gone on, and whoever returns writes nothing of an older world between their lines."""

KEPT: Final = 4
"""Lines that every rank keeps, should rank 0 die before they are written."""


@dataclass(frozen=True, slots=True)
class _Line:
    """`inherited`: of an older world, whose rank 0 may have written it."""

    queued_at: float
    row: Row
    loss: float | None
    values: dict[str, Any]
    inherited: bool


class StepMetrics:
    """The metrics of the steps that this process takes part in; one per process.

    Attributes:
        rows: steps whose loss is not known yet.
        loss: the newest mean over a global batch that is known, NaN for none.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self._run_dir = run_dir
        self._writer: MetricWriter | None = None
        self._kept: list[Metric] = []
        self._generation = -1
        self.rows = Rows(self._write)
        self.loss = math.nan

    def lines(self) -> tuple[dict[str, Any], ...]:
        """What this rank knows of the last lines, oldest first, as JSON: rank 0 may not have written them."""
        waiting = [as_metric(row, loss) for row, loss in self.rows.known()]
        return tuple(msgspec.to_builtins(line) for line in [*self._kept, *waiting])

    def enter(
        self,
        generation: int,
        rank: int,
        after: tuple[int, int],
        *,
        live: bool,
        told: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """`generation` begins, in which this process is `rank`.

        Args:
            after: (generation, step) that it goes on from.
            live: from what its ranks held.
            told: what `lines` gave on them, each step once, oldest first.
        """
        self._generation = generation
        if rank != 0:
            self._close_writer()
        elif self._writer is None and self._run_dir is not None:
            self._writer = MetricWriter(self._run_dir / METRICS_NAME)
        newest = Row(after[1], after[0], time.time(), 0) if live and after[1] > 0 else None
        for line in (msgspec.convert(data, Metric) for data in told):
            row = Row(line.step, line.generation, line.wall_time, line.world_size, line.values)
            if (line.generation, line.step) == after:
                newest = row
            elif (line.generation, line.step) < after and line.step < after[1]:
                self._write(row, line.loss)
        self.rows.enter(newest)

    def committed(self, row: Row, values: Mapping[str, Any], loss_sums: Sequence[float] | None) -> None:
        """A step has committed; `loss_sums` came with it."""
        if loss_sums is not None:
            self.rows.arrived(loss_sums)
        row.values = {name: value for name, value in values.items() if name != "loss"}
        self.rows.add(row, values.get("loss"))

    def close(self, told: Iterable[Told] = ()) -> None:
        """No step follows; `told`: what the ranks that could tell still had. Everything is written then, if
        the disk takes it within `CLOSE_LIMIT_S`."""
        self.rows.end(told)
        self._close_writer()

    def _write(self, row: Row, loss: float | None) -> None:
        self.loss = math.nan if loss is None else loss
        line = as_metric(row, loss)
        known = [kept for kept in self._kept if (kept.generation, kept.step) < (line.generation, line.step)]
        self._kept = [*known, line][-KEPT:]
        if self._writer is not None:
            self._writer.write(row, loss, inherited=row.generation != self._generation)

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def told_by_all(store: Any, rank: int, world_size: int, mine: Told) -> list[Told]:
    """At the end of a job, on rank 0: what all ranks still have of the losses of the last steps, through the
    generation's store. Only its own when a rank does not say it within `CLOSE_LIMIT_S`."""
    try:
        if rank != 0:
            store.set(f"told/{rank}", msgspec.json.encode(mine))
        elif world_size > 1:
            keys = [f"told/{other}" for other in range(1, world_size)]
            store.wait(keys, timedelta(seconds=CLOSE_LIMIT_S))
            return [mine, *(msgspec.json.decode(told, type=Told) for told in store.multi_get(keys))]
    except (RuntimeError, ValueError):
        return [mine]
    return [mine]


class MetricWriter:
    """`write` never blocks on the disk or on a device."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log = MetricLog(path)
        self._lines: queue.Queue[_Line | None] = queue.Queue(QUEUE_MAX)
        self.dropped = 0
        self._free_at = time.monotonic()
        """When the thread last had nothing to do but to wait for a line."""
        self._thread = threading.Thread(target=self._run, name="autoglm-metrics", daemon=True)
        self._thread.start()

    def write(self, row: Row, loss: float | None, *, inherited: bool = False) -> None:
        """`inherited`: of an older world; not written when the file has it, or a later one."""
        kept = {
            key: value.detach() if isinstance(value, torch.Tensor) else value
            for key, value in row.values.items()
        }
        try:
            self._lines.put_nowait(_Line(time.monotonic(), row, loss, kept, inherited))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Everything written, if the disk takes it within `CLOSE_LIMIT_S`."""
        try:
            self._lines.put(None, timeout=CLOSE_LIMIT_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_LIMIT_S)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            now = time.monotonic()
            was_away = now - self._free_at > PAUSED_S
            if now - max(line.queued_at, self._free_at) > PAUSED_S:
                self.dropped += 1
            elif not (line.inherited or was_away) or self._is_new(line.row):
                row = line.row
                numbers = {
                    key: number
                    for key, value in line.values.items()
                    if (number := as_number(value)) is not None
                }
                self._log.write(
                    Metric(row.step, row.generation, row.wall_time, line.loss, row.world_size, numbers)
                )
            self._free_at = time.monotonic()
        self._log.close()

    def _is_new(self, row: Row) -> bool:
        """Whether the file has no later line: of a world that went on while this process was stopped, or of whoever
        inherited this one first."""
        last = newest(self._path)
        return last is None or (row.generation, row.step) > (last.generation, last.step)


def as_metric(row: Row, loss: float | None) -> Metric:
    """The line of `row`, without values that are on a device: nobody waits for them."""
    numbers = {
        key: number
        for key, value in row.values.items()
        if not (isinstance(value, torch.Tensor) and value.is_cuda)
        and (number := as_number(value)) is not None
    }
    return Metric(row.step, row.generation, row.wall_time, loss, row.world_size, numbers)


def as_number(value: Any) -> float | None:
    """A float, or None for what is not one finite number."""
    try:
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
