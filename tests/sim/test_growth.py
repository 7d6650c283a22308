"""What a recovery and a snapshot cost by number of nodes, and that the leader keeps up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoglm_elastic.bench import growth
from autoglm_elastic.cli.main import main
from autoglm_elastic.core.membership import (
    Entered,
    Finished,
    FinishJob,
    Generation,
    Member,
    MemberDown,
    MemberUp,
    Policy,
    Seal,
    start,
    step,
)
from autoglm_elastic.sim.growth import measure


def test_store_operations_of_a_recovery_are_one_a_node_and_a_few() -> None:
    small, large = measure(16), measure(128)
    for name in ("worker", "node", "start"):
        less, more = (getattr(each, name).store_operations for each in (small, large))
        assert (more - less) / (128 - 16) <= 3.0, name
    assert large.worker.store_operations <= 128 + 4
    assert large.node.store_operations <= 128 + 4
    assert large.snapshot.store_operations == 0, "the training's group carries it"
    assert large.snapshot.blobs == 128 + 2
    assert large.worker.virtual_s == small.worker.virtual_s


def test_more_nodes_than_letters_and_fewer_than_a_story_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(27).nodes == 27
    assert main(["simulate", "--growth", "--sizes", "2,8"]) == 2
    assert main(["simulate", "--growth", "--sizes", "16"]) == 2
    assert "16,256,4096" in capsys.readouterr().err


def test_the_command_prints_a_table_json_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "growth.png"
    assert main(["simulate", "--growth", "--sizes", "8,16,32", "--png", str(png)]) == 0
    assert "store operations, nodes" in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")
    assert main(["simulate", "--growth", "--sizes", "8,16", "--json"]) == 0
    assert [row["growth"]["nodes"] for row in json.loads(capsys.readouterr().out)] == [8, 16]


def test_a_fit_finds_the_power() -> None:
    assert growth.exponent([(2.0, 8.0), (4.0, 64.0), (8.0, 512.0)]) == pytest.approx(3.0)
    assert growth.exponent([(2.0, 0.0), (4.0, 1.0)]) is None


def test_a_leader_of_thousands_of_nodes_takes_each_event_in_little_more_than_constant_time() -> None:
    """With a scan of the placements for each node at each event, this takes many minutes."""
    nodes = 3000
    names = [f"n{index}" for index in range(nodes)]
    state = start(Policy(nodes - 1, nodes, 3, 1.0, 60.0, 30.0), first_generation=0, now=0.0)
    sealed: list[Generation] = []
    done = False

    def feed(event: MemberUp | MemberDown | Entered | Finished) -> None:
        nonlocal state, done
        state, effects = step(state, event)
        sealed.extend(effect.generation for effect in effects if isinstance(effect, Seal))
        done = done or any(isinstance(effect, FinishJob) for effect in effects)

    for name in names:
        feed(MemberUp(Member(name, name, 1, "default", 1), 0.0))
    for name in names:
        feed(Entered(name, 0, 1.0))
    feed(MemberDown(names[7], 2.0))
    for name in names:
        feed(Entered(name, 1, 3.0))
    for name in names:
        feed(Finished(name, 1, 4.0))
    assert [generation.world_size for generation in sealed] == [nodes, nodes - 1]
    assert done


def test_what_counts_in_a_generation_is_what_its_nodes_say() -> None:
    state = start(Policy(1, 4, 3, 1.0, 60.0, 30.0), first_generation=0, now=0.0)
    sealed: list[Generation] = []
    for name in "abcd":
        state, effects = step(state, MemberUp(Member(name, name, 1, "default", 1), 0.0))
        sealed += [effect.generation for effect in effects if isinstance(effect, Seal)]
    newest = Generation.from_json(sealed[-1].to_json() | {"number": 5, "grown_from": [[3, 2]]})
    for number in (2, 3, 5):
        nodes = newest.nodes_of(number) or ()
        assert {name for name in "abcde" if newest.counts(name, number)} == set(nodes)
