"""What `--rdzv-conf` may say to our rendezvous: names, numbers and their ranges.

Torch's own options (`read_timeout`, `keep_alive_interval`, …) may stand beside them and mean nothing here; what
resembles one of ours is a mistake, and is not passed over."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Final

from torch.distributed.elastic.rendezvous import RendezvousParameters

from autoglm_elastic.errors import UsageError

OPTIONS: Final = (
    "join_timeout", "timeout", "join_window_s", "lease_s", "first_generation", "max_restarts", "max_failures",
    "progress_s", "node", "nproc", "role", "is_host",
    "ca", "cert", "key", "server_name", "user", "password_file", "insecure",
)  # fmt: skip
_LIKE: Final = 0.8


def check_names(given: Iterable[str]) -> None:
    """Raises UsageError for a name that is none of ours, nor of torch's, but nearly one of ours."""
    for name in given:
        if name in OPTIONS:
            continue
        close = difflib.get_close_matches(name.casefold(), OPTIONS, n=1, cutoff=_LIKE)
        if close:
            raise UsageError(f"--rdzv-conf {name}: no such option", do=f"did you mean {close[0]}?")


def number_of(
    params: RendezvousParameters, name: str, default: float, low: float = 0.0, high: float = float("inf")
) -> float:
    """Raises UsageError for what is no finite number from `low` to `high`."""
    value: Any = params.get(name)
    if value is None:
        return default
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not low <= found <= high or found == float("inf"):
        limit = "or more" if high == float("inf") else f"to {high:g}"
        raise UsageError(f"--rdzv-conf {name}={value!r}", valid=f"a number, {low:g} {limit}")
    return found
