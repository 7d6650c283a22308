"""Spares a process, and those forked from it, torch's questions about names of addresses.

torch 2.13 asks the DNS for the name of the other end of every connection to a c10d store, only to be able to log it: in
the process that connects, and in the event loop of the server, where all ranks wait for it. A packet that is lost costs
the resolver's timeout, 5 s, in the midst of a recovery; a server that is down, twice that for each rank. torch stops
asking once it has been told "try again": here the resolver of this thread says so, without asking anybody, to a
connection that is made for that purpose.

Where this does not work (another C library, another torch) the questions stay: nothing depends on it but time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

_RETRY: Final = 1
"""`int retry` in glibc's `struct __res_state`, which begins with `int retrans, retry`: how often a server is asked."""

_TRIES_MAX: Final = 5
"""glibc's own bound: more means that this is no such struct."""


_done = False
"""Also in whoever is forked from a process that has done it."""


def forgo_reverse_lookups() -> None:
    """Takes 10 to 20 ms. Call it before the process has threads: standard error goes nowhere meanwhile. Never
    raises."""
    global _done
    if _done:
        return
    _done = True
    with (
        contextlib.suppress(OSError, AttributeError, ValueError),
        _asking_nobody(),
        _muted(),
        contextlib.closing(socket.socket()) as nobody,
    ):
        nobody.bind(("127.0.0.1", 0))  # and does not listen: the connection is refused
        with contextlib.suppress(DistError, RuntimeError):
            port = nobody.getsockname()[1]
            TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(milliseconds=1))


@contextlib.contextmanager
def _asking_nobody() -> Iterator[None]:
    """The resolver of this thread answers "try again" at once to what no file answers. Raises OSError or
    AttributeError where there is no such resolver."""
    resolver = ctypes.CDLL("libresolv.so.2")
    resolver.__res_init()
    resolver.__res_state.restype = ctypes.POINTER(ctypes.c_int)
    state = resolver.__res_state()
    tries = state[_RETRY]
    if not 0 < tries <= _TRIES_MAX:
        raise OSError("not glibc's resolver")
    state[_RETRY] = 0
    try:
        yield
    finally:
        state[_RETRY] = tries


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """torch complains on standard error, past Python."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
