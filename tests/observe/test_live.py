"""The live view from a recorded run: states, counts, lines, and files that grow."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from sample import write

from autoglm_elastic.core.lifecycle import TaskState
from autoglm_elastic.observe import events, live, status
from autoglm_elastic.observe.report import build
from autoglm_elastic.observe.text import lines


def _console() -> Console:
    return Console(file=io.StringIO(), width=110, force_terminal=False)


def _printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_view_counts_what_happened(tmp_path: Path) -> None:
    write(tmp_path)
    follower = live.Follower(tmp_path)
    follower.refresh()
    view = follower.view
    assert (view.step, view.generation, view.world_size) == (120, 4, 4)
    assert (view.failures, view.recoveries, view.steps_redone, view.snapshots) == (2, 2, 1, 4)
    assert view.tracker.job is TaskState.DONE
    assert [(row.rank, row.node, row.pid) for row in view.rows()] == [
        (0, "node-a", 101),
        (1, "node-a", 103),
        (2, "node-b", 203),
        (3, "node-b", 204),
    ]


def test_plain_lines_tell_the_story_in_order(tmp_path: Path) -> None:
    write(tmp_path)
    follower, console = live.Follower(tmp_path), _console()
    shown = live.display(console, title="t", steps=120, plain=False)
    assert isinstance(shown, live.PlainDisplay), "not a terminal"
    with shown:
        shown.show(follower.view, follower.refresh())
    text = _printed(console)
    story = [
        "killed on purpose: worker rank 1",
        "back after 194 ms",
        "2 workers",
        "2 → 4 workers",
        "finished",
    ]
    positions = [text.index(part) for part in story]
    assert positions == sorted(positions)
    assert "step 120 of 120" in text


def test_the_picture_shows_a_dead_rank(tmp_path: Path) -> None:
    write(tmp_path, until_step=30)
    lines = (tmp_path / events.EVENTS_NAME).read_bytes().splitlines(keepends=True)
    death = next(number for number, line in enumerate(lines) if b"worker.died" in line)
    (tmp_path / events.EVENTS_NAME).write_bytes(b"".join(lines[: death + 1]))
    follower, console = live.Follower(tmp_path), _console()
    follower.refresh()
    console.print(live.render(follower.view, title="demo", steps=120))
    text = _printed(console)
    assert "recovering" in text
    assert "failed" in text
    assert "step 30 of 120" in text


def test_a_tail_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "f"
    tail = live.Tail(path)
    assert tail.lines() == []
    with path.open("ab", buffering=0) as file:
        file.write(b"one\ntw")
        assert tail.lines() == [b"one"]
        assert tail.lines() == []
        file.write(b"o\n")
        assert tail.lines() == [b"two"]


def test_a_node_that_vanished_is_an_incident_although_nobody_opened_it(tmp_path: Path) -> None:
    write(tmp_path, until_step=70)
    path = tmp_path / events.EVENTS_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b'"id":2' not in line))
    follower = live.Follower(tmp_path)
    follower.refresh()
    assert (follower.view.failures, follower.view.recoveries) == (2, 2)


def test_lines_of_several_agents_may_come_in_any_order(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / events.EVENTS_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(reversed(lines)))
    follower = live.Follower(tmp_path)
    follower.refresh()
    assert follower.view.snapshots == 4


def test_a_job_in_which_no_step_was_committed_has_finished_too(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / events.EVENTS_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    first = next(at for at, line in enumerate(lines) if b'"generation.sealed"' in line)
    path.write_bytes(b"".join(lines[: first + 1] + lines[-1:]))
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    follower = live.Follower(tmp_path)
    follower.refresh()
    assert follower.view.tracker.job is TaskState.DONE


def test_of_a_script_without_commits_it_is_seen_that_all_workers_were_started_again(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path / events.EVENTS_NAME, source="a")
    follower = live.Follower(tmp_path)
    told: list[TaskState] = []

    def look() -> None:
        follower.refresh()
        told.append(follower.view.tracker.job)

    def sealed(number: int, parent: int) -> None:
        log.emit(
            events.GenerationSealed(
                number=number, parent=parent, world_size=2, nodes=["a"], nprocs=[2], planned=False
            ),
            wall_time=100.0 * number,
        )
        for rank in range(2):
            look()
            log.emit(
                events.WorkerStarted(
                    rank=rank, local_rank=rank, node="a", pid=9, generation=number, how="fork"
                ),
                wall_time=100.0 * number + 1 + rank,
            )
        look()

    sealed(1, -1)
    assert told == [TaskState.INIT, TaskState.INIT, TaskState.RUNNING]
    for number in (1, 2):
        opened = 100.0 * number + 50
        log.emit(events.IncidentOpened(id=number, reason="rank 0 died", node="a", rank=0), wall_time=opened)
        told.clear()
        sealed(number + 1, number)
        assert told == [TaskState.RECOVERING, TaskState.RECOVERING, TaskState.RUNNING]
        assert follower.view.incidents[-1].restarted_s == 52.0
    assert (follower.view.failures, follower.view.recoveries) == (2, 2)
    log.emit(events.JobFinished(step=-1, generation=3), wall_time=400.0)
    text = "\n".join(lines(build(tmp_path)))
    assert "done, no committed step" in text
    assert text.count("all workers started again 52 s") == 2
    assert "not recovered" not in text
    assert "all workers started again after 52 s" in "\n".join(status.lines(status.read(tmp_path)))
