"""`RUN/metrics.jsonl` from a thread of its own, so that logging never makes training wait or fail.

Rank 0's. What the queue cannot take is dropped and counted.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from autoglm_elastic.observe.metrics import Metric, MetricLog

QUEUE_MAX: Final = 4096
"""Steps that may wait to be written; a disk that is further behind loses lines, not time."""

CLOSE_LIMIT_S: Final = 5.0

_Row = tuple[int, int, float, int, dict[str, Any]]


class MetricWriter:
    """`write` never blocks on the disk or on a device."""

    def __init__(self, path: Path) -> None:
        self._log = MetricLog(path)
        self._rows: queue.Queue[_Row | None] = queue.Queue(QUEUE_MAX)
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="autoglm-metrics", daemon=True)
        self._thread.start()

    def write(self, step: int, generation: int, world_size: int, values: Mapping[str, Any]) -> None:
        kept = {
            key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in values.items()
        }
        try:
            self._rows.put_nowait((step, generation, time.time(), world_size, kept))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Everything written, if the disk takes it within `CLOSE_LIMIT_S`."""
        try:
            self._rows.put(None, timeout=CLOSE_LIMIT_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_LIMIT_S)

    def _run(self) -> None:
        while (row := self._rows.get()) is not None:
            step, generation, wall_time, world_size, values = row
            numbers = {
                key: number for key, value in values.items() if (number := as_number(value)) is not None
            }
            loss = numbers.pop("loss", None)
            self._log.write(Metric(step, generation, wall_time, loss, world_size, numbers))
        self._log.close()


def as_number(value: Any) -> float | None:
    """A float, or None for what is not one finite number."""
    try:
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
