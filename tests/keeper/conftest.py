"""A run directory's keeper for a test, and proof that it ends."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoglm_elastic.keeper import Keeper
from autoglm_elastic.keeper.address import socket_path
from autoglm_elastic.settings import Keeper as KeeperSettings

END_S = 30.0
NODE = "node"

Ensure = Callable[..., Keeper]


@pytest.fixture
def ensure(run_dir: Path) -> Iterator[Ensure]:
    """Connects to the keeper of `run_dir`. Afterwards every keeper that was met has ended and left nothing."""
    keepers: list[Keeper] = []
    watched: dict[int, int] = {}

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
        watched.setdefault(keeper.pid, os.pidfd_open(keeper.pid))
        return keeper

    yield connect
    for keeper in keepers:
        keeper.close()
    for pid, pidfd in watched.items():
        assert ended(pidfd, END_S), f"keeper {pid} lives on"
        os.close(pidfd)
    assert not os.path.exists(socket_path(str(run_dir), NODE))


def ended(pidfd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))
