"""torch's own rendezvous backends, with a bound where torch has none.

A c10d store's client waits without end for the first answer of whatever has accepted its connection. Nothing else
about the backends is changed. May touch: one thread, which is left behind when the bound is passed: its wait in C++
cannot be ended, and the process is about to.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Final

from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from autoglm_elastic.errors import UsageError

READ_TIMEOUT_S: Final = 60
"""torch's default of `--rdzv-conf read_timeout`, within which it connects, or gives up by itself."""

SLACK_S: Final = 15.0
"""What it may take beyond: it tries twice, and its threads start slowly on a busy machine."""


def handler_of(parameters: RendezvousParameters) -> RendezvousHandler:
    """torch's handler.

    Raises what torch raises, and UsageError when the endpoint accepts connections but is no c10d store.
    """
    if parameters.backend != "c10d":
        return get_rendezvous_handler(parameters)
    read_timeout_s = READ_TIMEOUT_S
    with contextlib.suppress(ValueError):  # torch says so itself
        read_timeout_s = parameters.get_as_int("read_timeout", READ_TIMEOUT_S) or READ_TIMEOUT_S
    answers: queue.SimpleQueue[RendezvousHandler | BaseException] = queue.SimpleQueue()

    def make() -> None:
        try:
            answers.put(get_rendezvous_handler(parameters))
        except BaseException as error:  # noqa: BLE001 - raised again below
            answers.put(error)

    threading.Thread(target=make, name="autoglm-rendezvous", daemon=True).start()
    try:
        answer = answers.get(timeout=read_timeout_s + SLACK_S)
    except queue.Empty:
        raise UsageError(
            f"port {parameters.endpoint} accepts connections but does not answer like a c10d store",
            do="choose another --rdzv-endpoint, or end what holds the port",
        ) from None
    if isinstance(answer, BaseException):
        raise answer
    return answer
