"""Starting a keeper's process, and a first word with it. Bounded in time; whoever loses a race uses the
winner's."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

from autoglm_elastic.errors import PlatformError
from autoglm_elastic.keeper.process import READY
from autoglm_elastic.settings import Keeper as KeeperSettings

START_S: Final = 30.0
"""From the fork to a listening socket: an interpreter and few imports, on a machine that may be very busy."""
_REASON_BYTES_MAX: Final = 4096


def start(path: str, url: str, settings: KeeperSettings) -> None:
    """A keeper listens at `path` when this returns, this one or another. Raises PlatformError."""
    reader, writer = os.pipe()
    try:
        try:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",  # the current directory must not hide our modules
                    "-m",
                    __package__,
                    path,
                    url,
                    msgspec.json.encode(settings).decode(),
                    str(writer),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(writer,),
                env=_environment(),
            )
        finally:
            os.close(writer)
        said = _listen_to(reader)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(START_S)
    except OSError as error:
        raise PlatformError(f"the keeper could not be started: {error.strerror}") from error
    finally:
        os.close(reader)
    if said is None:
        process.kill()
        raise PlatformError(f"the keeper was not ready within {START_S} s")
    if said not in (b"", READY):
        raise PlatformError(f"the keeper could not be started: {said.decode(errors='replace')}")


def _listen_to(reader: int) -> bytes | None:
    """What the process said until it closed the pipe; None when it did not in time."""
    said = b""
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    while len(said) < _REASON_BYTES_MAX:
        if not poller.poll(START_S * 1000):
            return None
        data = os.read(reader, _REASON_BYTES_MAX)
        if not data:
            break
        said += data
    return said


def _environment() -> dict[str, str]:
    """Ours, in which the process finds this very package."""
    environment = dict(os.environ)
    here = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (here, environment.get("PYTHONPATH"))))
    return environment


def connect(path: str, timeout_s: float) -> socket.socket | None:
    """A connection to whoever listens there, or None when nobody does."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    return connection
