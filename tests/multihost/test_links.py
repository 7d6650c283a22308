"""The link of one host is slow, loses and reorders, or is narrow: training goes on, and nobody is taken for dead."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from etcd_cluster import needs_etcd
from job import SCRIPTS
from net import needs_hosts
from scene import NODES, TRAIN, Scene, Training, scene
from wire import needs_wires

pytestmark = [pytest.mark.multihost, pytest.mark.long, pytest.mark.timeout(300), needs_hosts, needs_etcd]

HOST = NODES[1]
DELAY_S = 0.05
NARROW_MBIT_S = 10
WIDE = (SCRIPTS / "train.py", "--steps=100000", "--hidden=5000")
"""Gradients of 340 KiB: more than the narrow link carries in the time of a step."""
STEPS = 30


def delayed(here: Scene) -> None:
    here.network.wires[HOST].delay_s = DELAY_S


def lossy(here: Scene) -> None:
    here.network.wires[HOST].lost = 0.01


def reordering(here: Scene) -> None:
    wire = here.network.wires[HOST]
    wire.delay_s, wire.reordered, wire.lost = 0.01, 0.25, 0.01


def narrow(here: Scene) -> None:
    here.network.narrow(HOST, NARROW_MBIT_S)


@pytest.mark.parametrize(
    ("worsen", "what", "training", "wired"),
    [
        pytest.param(delayed, "50 ms each way", TRAIN, (HOST,), marks=needs_wires),
        pytest.param(lossy, "1 % lost", TRAIN, (HOST,), marks=needs_wires),
        pytest.param(
            reordering, "10 ms each way, 25 % out of order, 1 % lost", TRAIN, (HOST,), marks=needs_wires
        ),
        (narrow, f"{NARROW_MBIT_S} Mbit/s, and gradients of 340 KiB", WIDE, ()),
    ],
    ids=["delayed", "lossy", "reordering", "narrow"],
)
def test_on_a_bad_link_nobody_is_evicted_and_a_worker_is_replaced(
    tmp_path: Path,
    worsen: Callable[[Scene], None],
    what: str,
    training: Training,
    wired: tuple[str, ...],
) -> None:
    with scene(tmp_path, training, wired=wired) as (here, _):
        worsen(here)
        before = here.generations()
        here.trains(len(NODES), more=STEPS)
        assert here.generations() == before, "somebody was evicted"
        for number, host in enumerate((HOST, NODES[2]), 1):
            here.fault()
            os.kill(here.workers[host], signal.SIGKILL)
            here.trains(len(NODES), more=STEPS // 3)
            here.recovered(
                f"worker {'there' if host == HOST else 'elsewhere'} killed; a link: {what}", "no step lost"
            )
            assert len(here.generations()) == len(before) + number, "one generation a death"
        assert here.events("node.left") == []
        here.end()
