"""What became of an effect. It lives here because the machines decide on it; `ports` shows it to the
adapters."""

from __future__ import annotations

import enum


class Outcome(enum.Enum):
    """What became of an effect. `UNKNOWN` (a timeout after the request left) is settled by reading, never
    assumed."""

    OK = "ok"
    CONFLICT = "conflict"
    UNKNOWN = "unknown"
