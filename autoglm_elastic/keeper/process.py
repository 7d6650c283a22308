"""The keeper's process: priority, name, listening, the end. One a node and run directory."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Final

import msgspec

from autoglm_elastic.catalog import failpoints
from autoglm_elastic.coordination.clock import SystemClock
from autoglm_elastic.keeper import address, memory
from autoglm_elastic.keeper.messages import one_line
from autoglm_elastic.keeper.server import Server
from autoglm_elastic.settings import Keeper as KeeperSettings
from autoglm_elastic.storage import LocalBlobs, open_blobs

READY: Final = b"ready\n"
_NOT_FOR_US: Final = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Schedulers send these to every process of a job, which then wants one more snapshot: of us. We end by ourselves."""


def run(path: str, url: str, settings: str, pipe: int) -> None:
    """Serves until nobody needs it. On `pipe`: READY, or why not, or nothing when another one is there."""
    try:
        for number in _NOT_FOR_US:
            signal.signal(number, signal.SIG_IGN)
        chosen = msgspec.json.decode(settings, type=KeeperSettings)
        memory.step_back(chosen.nice)
        blobs = open_blobs(url)
        if isinstance(blobs, LocalBlobs):
            blobs.direct = True
        with address.locked(path, wait=True) as held:
            listener = address.listen(path) if held else None
        if listener is None:
            return
        server = Server(
            listener,
            path,
            url,
            blobs,
            chosen,
            failpoint=failpoints.from_environment(os.environ),
            wall=SystemClock().wall,
        )
        signal.signal(signal.SIGTERM, lambda *_: server.hurry())
        os.write(pipe, READY)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(pipe, one_line(error).encode())
        raise
    finally:
        os.close(pipe)
    server.run()
