"""The line to the keeper: what waits for a keeper, and what must not."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest

from autoglm_elastic.errors import ElasticError
from autoglm_elastic.keeper import Keeper
from autoglm_elastic.settings import Keeper as KeeperSettings
from autoglm_elastic.snapshot import Line

SETTINGS = KeeperSettings(linger_s=0)
WAIT_S = 60.0


@pytest.mark.parametrize("ending", ["enter", "close"])
def test_a_keeper_that_does_not_answer_keeps_nobody_from_the_next_world(tmp_path: Path, ending: str) -> None:
    """Opening the line waits for the keeper's greeting; entering a generation, and leaving, do not."""
    run_dir = str(tmp_path / "run")
    with contextlib.closing(Line(run_dir, settings=SETTINGS)) as first:
        keeper = first.open()
        assert isinstance(keeper, Keeper)
        line = Line(run_dir, settings=SETTINGS)
        line.enter(rank=0, world_size=2, generation=1)
        begun, opened = threading.Event(), threading.Event()
        errors: list[ElasticError] = []

        def open_line() -> None:
            begun.set()
            try:
                line.open()
            except ElasticError as error:
                errors.append(error)
            opened.set()

        opener = threading.Thread(target=open_line, daemon=True)
        os.kill(keeper.pid, signal.SIGSTOP)
        try:
            opener.start()
            assert begun.wait(WAIT_S)
            if ending == "enter":
                line.enter(rank=1, world_size=3, generation=2)
            else:
                line.close()
            assert not opened.is_set()
        finally:
            os.kill(keeper.pid, signal.SIGCONT)
        assert opened.wait(WAIT_S)
        opener.join(WAIT_S)
        if ending == "enter":
            assert not errors
            assert isinstance(line.open(), Keeper)
        line.close()
