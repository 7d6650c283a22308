"""Reports from a recorded run, and from logs that stop in the middle."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from sample import START, STEP_S, write

from autoglm_elastic.errors import UsageError
from autoglm_elastic.observe import events, metrics, plot, presence, report, text, timeline
from autoglm_elastic.observe.metrics import Metric, MetricLog


def test_incidents_tell_what_happened_and_what_it_cost(tmp_path: Path) -> None:
    write(tmp_path)
    result = report.build(tmp_path)
    worker, node = result.incidents
    assert (worker.broke, worker.generation, worker.rank) == (1, 2, 1)
    assert (worker.world_before, worker.world_after, worker.steps_lost) == (4, 4, 0)
    assert worker.seconds == pytest.approx(0.004 + 0.03 + 0.06 + STEP_S, abs=1e-3)
    assert sum(worker.phases_s.values()) == pytest.approx(worker.seconds), "phases have no gap and no overlap"
    assert set(worker.phases_s) == set(events.PHASES)
    assert (node.world_before, node.world_after, node.steps_lost, node.from_step) == (4, 2, 1, 59)
    assert [(change.kind, change.world_after) for change in result.changes] == [("start", 4), ("growth", 4)]


def test_goodput_leaves_out_startup_incidents_stalls_and_what_was_redone(tmp_path: Path) -> None:
    write(tmp_path)
    result = report.build(tmp_path)
    assert result.status == "done"
    assert (result.step, result.steps_committed, result.steps_redone) == (120, 120, 1)
    assert result.startup_s == pytest.approx(3.1, abs=1e-3)
    stalls = 4 * 0.01
    assert result.committed_s == pytest.approx(120 * STEP_S - stalls, abs=1e-2)
    assert result.goodput == pytest.approx(result.committed_s / result.wall_s)
    assert result.wall_s > 120 * STEP_S + 3


def test_steps_of_an_abandoned_branch_do_not_count(tmp_path: Path) -> None:
    steps = [Metric(step=s, generation=1, wall_time=START + s) for s in range(1, 21)]
    steps += [Metric(step=s, generation=2, wall_time=START + 30 + s) for s in range(11, 16)]
    chain = metrics.lineage(steps)
    assert [metric.step for metric in chain] == list(range(1, 16))
    assert [metric.generation for metric in chain[9:12]] == [1, 2, 2]
    assert report.committed_seconds(chain) == pytest.approx(15.0)


def test_several_agents_report_one_incident_once(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path / events.EVENTS_NAME, source="a")
    log.emit(events.JobStarted(run_id="r", node="a"), wall_time=0.0)
    log.emit(events.IncidentOpened(id=1, reason="first"), wall_time=1.0)
    log.emit(events.IncidentOpened(id=1, reason="me too"), wall_time=1.1)
    log.emit(events.IncidentOpened(id=2, reason="broke again on the way"), wall_time=1.2)
    log.emit(
        events.IncidentClosed(generation=3, step=5, from_step=4, tier="live", committed_wall_time=2.0),
        wall_time=2.0,
    )
    log.emit(events.IncidentOpened(id=1, reason="late"), wall_time=2.1)
    log.close()
    (incident,) = report.build(tmp_path).incidents
    assert (incident.reason, incident.opened, incident.closed, incident.generation) == ("first", 1.0, 2.0, 3)
    assert incident.steps_lost is None


def test_a_run_that_is_not_over_and_one_that_failed(tmp_path: Path) -> None:
    write(tmp_path, until_step=40)
    with presence.declared(tmp_path, "node-a"):
        running = report.build(tmp_path)
    assert (running.status, running.step) == ("running", 40)
    assert report.build(tmp_path).status == "cut off"
    log = events.EventLog(tmp_path / events.EVENTS_NAME, source="a")
    log.emit(events.IncidentOpened(id=4, reason="rank 1: ValueError"), wall_time=START + 100)
    log.emit(events.JobFailed(reason="rank 1: ValueError: no"), wall_time=START + 101)
    log.close()
    failed = report.build(tmp_path)
    assert (failed.status, failed.reason) == ("failed", "rank 1: ValueError: no")
    assert failed.incidents[-1].seconds is None
    assert any("not recovered" in line for line in text.lines(failed))


def test_a_directory_without_a_log_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no events\.jsonl"):
        report.build(tmp_path)


def test_an_empty_log_has_an_empty_report(tmp_path: Path) -> None:
    (tmp_path / events.EVENTS_NAME).touch()
    result = report.build(tmp_path)
    assert (result.step, result.goodput, result.incidents) == (-1, None, [])
    assert text.lines(result)


def test_the_text_says_it_in_few_lines(tmp_path: Path) -> None:
    write(tmp_path)
    told = text.lines(report.build(tmp_path))
    assert told[0].startswith("run demo: done, step 120")
    assert any("fault → next new step 194 ms, 0 steps lost" in line for line in told)
    assert any("grew, 2 → 4 workers" in line for line in told)
    assert len(told) < 15


def test_a_loss_that_is_not_a_number_is_null(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / events.METRICS_NAME)
    log.write(Metric(step=1, generation=1, wall_time=0.0, loss=float("nan"), values={"lr": 0.1}))
    log.close()
    (metric,) = metrics.read(tmp_path / events.METRICS_NAME)
    assert (metric.loss, metric.values) == (None, {"lr": 0.1})


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path)
    steps = list(metrics.read(tmp_path / events.METRICS_NAME))
    path = plot.loss_curve(tmp_path / "loss.png", report.build(tmp_path), steps, undisturbed=steps)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 20_000


def many(tmp_path: Path, incidents: int) -> report.Report:
    """The recorded run, as if its first incident had come so often; the second one is as it was."""
    write(tmp_path)
    told = report.build(tmp_path)
    first, second = told.incidents
    told.incidents = [msgspec.structs.replace(first, opened=START + 3 + each) for each in range(incidents)]
    told.incidents.append(second)
    return told


def test_many_incidents_are_told_by_what_they_have_in_common(tmp_path: Path) -> None:
    told = many(tmp_path, 50)
    lines = text.lines(told)
    assert len(lines) < 35
    assert "51 incidents" in lines
    assert (
        "  50x went on with as many workers, state live: median 194 ms, worst 194 ms, 0 steps lost" in lines
    )
    assert any(line.startswith("  1x went on with fewer workers") and "1 step lost" in line for line in lines)
    assert any(line.startswith("  51. ") for line in lines), "what cost a step is told by itself"
    every = text.lines(told, each=True)
    assert all(any(line.startswith(f"  {number}. ") for line in every) for number in range(1, 52))


@pytest.mark.parametrize("incidents", [0, 1, 200])
def test_the_timeline_is_a_picture(tmp_path: Path, incidents: int) -> None:
    pytest.importorskip("matplotlib")
    told = many(tmp_path, incidents)
    steps = list(metrics.read(tmp_path / events.METRICS_NAME))
    assert timeline.draw(tmp_path / "timeline.png", told, steps).read_bytes().startswith(b"\x89PNG")
    assert plot.loss_curve(tmp_path / "loss.png", told, steps).stat().st_size > 20_000
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["loss.png", "timeline.png"]


def test_a_run_without_losses_has_no_picture(tmp_path: Path) -> None:
    write(tmp_path, until_step=0)
    with pytest.raises(UsageError, match="no step of this run has a loss"):
        plot.loss_curve(tmp_path / "loss.png", report.build(tmp_path), [])


def test_a_node_that_vanished_is_an_incident_although_nobody_opened_it(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / events.EVENTS_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b'"id":2' not in line))
    _, node = report.build(tmp_path).incidents
    assert (node.broke, node.generation, node.world_after, node.steps_lost) == (2, 3, 2, 1)
    assert sum(node.phases_s.values()) == pytest.approx(node.seconds)
