"""Why a call of a session did not give what was asked for."""

from __future__ import annotations

from autoglm_elastic.agent._view import Closed
from autoglm_elastic.errors import ElasticError, FencedError, PlatformError


class Superseded(FencedError):
    """The generation that was asked about is not the newest any more."""

    def __init__(self, generation: int) -> None:
        super().__init__(f"generation {generation} is over: a newer one is sealed")


class RunClosed(ElasticError):
    """The run is over; `closed` says how."""

    def __init__(self, closed: Closed) -> None:
        super().__init__(f"the run is closed ({closed.outcome}): {closed.reason}")
        self.closed = closed


class WaitTimeout(PlatformError):
    """What was waited for did not come in time."""


class NotJoined(ElasticError):
    """The session holds no lease: it has not joined, has left, or lost it."""
