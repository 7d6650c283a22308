"""What an exception that left the user's function says about the world, telling the launcher of it, and letting go of
what it holds."""

from __future__ import annotations

import os
import re
import traceback
from typing import Final

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from autoglm_elastic.errors import PlatformError

_PEER_IS_GONE: Final = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|connect timeout|broken pipe"
    r"|remote process exited|ncclRemoteError",
    re.IGNORECASE,
)
"""gloo's words, TCPStore's and NCCL's."""


def is_collective(error: BaseException) -> bool:
    """Whether an error, or what led to it, came out of a collective or the c10d store."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (dist.DistError, PlatformError)) or "gloo" in str(seen).lower():
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error, or what led to it, says that somebody at the other end is gone: never an error of the user's
    here, and whoever supervises that one will say what became of it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistNetworkError) or _PEER_IS_GONE.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def record(error: Exception) -> None:
    """For the launcher's summary, as torch's `@record` does: it names the error, not only an exit code."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


def forget(error: BaseException) -> None:
    """Let go of what the user's frames hold: models, optimizers, activations."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
