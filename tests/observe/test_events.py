"""The event log: closed, bounded, append-only, and never in the way."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from autoglm_elastic.observe import document, events
from autoglm_elastic.observe.events import EventLog

REPOSITORY = Path(__file__).resolve().parents[2]


def _written(path: Path) -> list[events.EventRecord]:
    return list(events.read(path))


def test_an_event_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / events.EVENTS_NAME
    log = EventLog(path, source="node-a", wall=lambda: 12.5)
    died = events.WorkerDied(rank=3, local_rank=1, node="node-a", pid=7, generation=2, exit_code=-9, step=40)
    log.emit(died)
    log.emit(events.NodeLeft(node="node-b"), source="node-b", wall_time=3.0)
    log.close()
    first, second = _written(path)
    assert (first.wall_time, first.source, first.name, first.event()) == (12.5, "node-a", "worker.died", died)
    assert (second.wall_time, second.source) == (3.0, "node-b")


@pytest.mark.parametrize(
    ("name", "fields", "problem"),
    [
        ("worker.exploded", {}, "no such event"),
        ("node.left", {"node": 3}, "Expected `str`"),
        ("node.left", {"node": "a", "mood": "bad"}, "unknown field `mood`"),
        ("node.left", {}, "missing required field `node`"),
    ],
)
def test_the_set_of_events_is_closed(
    tmp_path: Path, name: str, fields: dict[str, object], problem: str
) -> None:
    log = EventLog(tmp_path / "e", source="a")
    log.emit_named(name, fields)
    log.close()
    (record,) = _written(tmp_path / "e")
    fault = record.event()
    assert isinstance(fault, events.LogFault)
    assert fault.name == name
    assert problem in fault.problem
    assert log.faults == 1


def test_a_known_event_by_name(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e", source="a")
    log.emit_named("snapshot.aborted", {"step": 3, "generation": 1, "reason": "disk full"}, source="a/2")
    log.close()
    (record,) = _written(tmp_path / "e")
    assert record.event() == events.SnapshotAborted(step=3, generation=1, reason="disk full")
    assert record.source == "a/2"
    assert log.faults == 0


def test_a_long_event_is_cut_to_one_line_of_the_limit(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e", source="a")
    log.emit(
        events.PlanDecided(
            generation=1, tier="disk", step=1, reason="r" * 9000, rejected=["x" * 900, *["y"] * 500]
        )
    )
    log.close()
    data = (tmp_path / "e").read_bytes()
    assert len(data) < events.LINE_BYTES_MAX
    (record,) = _written(tmp_path / "e")
    decided = record.event()
    assert isinstance(decided, events.PlanDecided)
    assert decided.reason.endswith("…")


def test_a_torn_last_line_is_passed_over_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "e"
    log = EventLog(path, source="a")
    log.emit(events.NodeLeft(node="a"))
    log.close()
    with path.open("ab") as file:
        file.write(b'{"wall_time":1,"sou')
    assert [record.fields["node"] for record in _written(path)] == ["a"]
    log = EventLog(path, source="b")
    log.emit(events.NodeLeft(node="b"))
    log.close()
    assert [record.fields["node"] for record in _written(path)] == ["a", "b"]


def test_a_fault_of_the_log_is_counted_and_never_raised(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "missing" / "e", source="a")
    log.emit(events.NodeLeft(node="a"))
    log.emit(events.NodeLeft(node=object()))  # type: ignore[arg-type]
    log.emit_named("node.left", {"node": object()})
    assert log.faults >= 3
    log.close()


def test_a_file_that_is_not_there_has_no_events(tmp_path: Path) -> None:
    assert _written(tmp_path / "e") == []


def _append(path: str, source: str, count: int) -> None:
    log = EventLog(path, source=source)
    for number in range(count):
        log.emit(events.NodeLeft(node=f"{source}-{number}", reason="r" * 300))
    log.close()


def test_several_processes_append_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "e"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append, args=(os.fspath(path), f"w{n}", 200)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    names = [record.fields["node"] for record in _written(path)]
    assert len(names) == 600
    for number in range(3):
        own = [name for name in names if name.startswith(f"w{number}-")]
        assert own == [f"w{number}-{n}" for n in range(200)]


def test_the_documentation_is_drawn_from_the_classes() -> None:
    assert (REPOSITORY / "docs" / "events.md").read_text() == document.markdown()
    for name, cls in events.EVENTS.items():
        assert cls.__doc__, name
