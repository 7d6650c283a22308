"""A run directory's keeper for a test, and proof that it ends and leaves nothing."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoglm_elastic.keeper import Keeper
from autoglm_elastic.keeper.address import socket_path
from autoglm_elastic.settings import Keeper as KeeperSettings
from tests.keeper.ranks import Rank

END_S = 30.0
NODE = "node"

Ensure = Callable[..., Keeper]


class Watch:
    """Keepers that a test met; each has to end."""

    def __init__(self, run_dir: Path) -> None:
        self.socket = socket_path(str(run_dir), NODE)
        self._pidfds: dict[int, int] = {}

    def meet(self, pid: int) -> None:
        if pid not in self._pidfds:
            self._pidfds[pid] = os.pidfd_open(pid)

    def ended(self, pid: int) -> bool:
        """Waits for it."""
        poller = select.poll()
        poller.register(self._pidfds[pid], select.POLLIN)
        return bool(poller.poll(END_S * 1000))

    def close(self) -> None:
        for pid, pidfd in self._pidfds.items():
            assert self.ended(pid), f"keeper {pid} lives on"
            os.close(pidfd)


@pytest.fixture
def watch(run_dir: Path) -> Iterator[Watch]:
    watching = Watch(run_dir)
    yield watching
    watching.close()


@pytest.fixture
def ensure(run_dir: Path, watch: Watch) -> Iterator[Ensure]:
    """Connects to the keeper of `run_dir` from this process."""
    keepers: list[Keeper] = []

    def connect(
        *, rank: int = 0, world_size: int = 1, generation: int = 1, settings: KeeperSettings | None = None
    ) -> Keeper:
        keeper = Keeper.ensure(
            str(run_dir),
            node=NODE,
            rank=rank,
            world_size=world_size,
            generation=generation,
            settings=settings or KeeperSettings(linger_s=0),
        )
        keepers.append(keeper)
        watch.meet(keeper.pid)
        return keeper

    yield connect
    for keeper in keepers:
        keeper.close()


@pytest.fixture
def start_rank(run_dir: Path, watch: Watch) -> Iterator[Callable[..., Rank]]:
    """Starts a rank in a process of its own."""
    ranks: list[Rank] = []

    def start(rank: int = 0, world_size: int = 1, linger_s: float = 0) -> Rank:
        one = Rank(run_dir, NODE, rank, world_size, linger_s)
        ranks.append(one)
        watch.meet(one.keeper_pid)
        return one

    yield start
    for rank in ranks:
        if rank.process.poll() is None:
            rank.kill()
