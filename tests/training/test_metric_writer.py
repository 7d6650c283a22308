"""Lines of metrics.jsonl when their process was stopped for a while, and when only the disk was slow."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from autoglm_elastic.observe import metrics as log
from autoglm_elastic.training import metrics
from autoglm_elastic.training.rows import Row


class Clock:
    """Of the process and of its writing thread, which may lag behind each other."""

    def __init__(self) -> None:
        self.now = self.thread_now = 0.0

    def monotonic(self) -> float:
        return self.thread_now if threading.current_thread().name == "autoglm-metrics" else self.now


def row(step: int) -> Row:
    return Row(step=step, generation=1, wall_time=float(step), world_size=2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def steps(path: Path) -> list[int]:
    return [metric.step for metric in log.read(path)]


def test_a_process_that_was_stopped_writes_nothing_old_when_it_goes_on(tmp_path: Path, clock: Clock) -> None:
    clock.thread_now = 10.0
    writer = metrics.MetricWriter(tmp_path / "metrics.jsonl")
    writer.write(row(1), 0.5)  # put at 0, seen at 10, by a thread that had nothing else to do
    clock.now = 10.0
    writer.write(row(2), 0.4)
    writer.close()
    assert steps(tmp_path / "metrics.jsonl") == [2]
    assert writer.dropped == 1


def test_what_was_put_after_it_went_on_is_no_newer_than_the_world_that_left_it(
    tmp_path: Path, clock: Clock
) -> None:
    """Its last collective had ended before the stop, so it still commits a step; meanwhile others have gone on."""
    path = tmp_path / "metrics.jsonl"
    writer = metrics.MetricWriter(path)
    others = log.MetricLog(path)
    others.write(log.Metric(9, 2, 9.0, 0.1, 1, {}))
    others.close()
    clock.now = clock.thread_now = 10.0
    writer.write(row(5), 0.5)
    writer.close()
    assert steps(path) == [9]


def test_lines_that_wait_for_a_slow_disk_are_all_written(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, goes_on = log.MetricLog.write, threading.Event()

    def slowly(self: log.MetricLog, metric: log.Metric) -> None:
        assert goes_on.wait(60)
        write(self, metric)
        clock.thread_now += 10.0

    monkeypatch.setattr(log.MetricLog, "write", slowly)
    writer = metrics.MetricWriter(tmp_path / "metrics.jsonl")
    for step in range(1, 5):
        writer.write(row(step), None)
    goes_on.set()
    writer.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert writer.dropped == 0
