"""The supervisor's dealings with a store that comes and goes: what it could not be told yet, and for how long its loss
is borne.

Running steps do not need the store. Membership stands still without it, so a loss has a limit, after which the
job is ended while it still can be ended well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from autoglm_elastic.agent.session import NotJoined, StoreLost
from autoglm_elastic.errors import PlatformError
from autoglm_elastic.ports import StoreUnavailable

logger = logging.getLogger(__name__)


RETRY_S_MIN = 0.1
RETRY_S_MAX = 2.0
"""Between attempts, doubling, at what failed without the whole store being lost: a single member of etcd that is cut
off takes a request and never says what became of it."""


class StoreSide:
    """`deadline`: when the loss has lasted `limit_s` (monotonic seconds), None without one. `gave_up`: it did.
    `retry_at`: when to try again what failed although the store is not lost, None for nothing."""

    def __init__(self, limit_s: float) -> None:
        self.deadline: float | None = None
        self.gave_up = False
        self.retry_at: float | None = None
        self._pause_s = RETRY_S_MIN
        self._limit_s = limit_s
        self._untold: list[Callable[[], None]] = []

    def tell(self, report: Callable[[], None]) -> None:
        """Report to the store; while it does not answer the report is kept until it is back (or our lease is lost).

        Reports may be repeated: each is one key with one content.
        """
        try:
            report()
        except StoreUnavailable as error:
            logger.warning("the store does not answer, will tell it later: %s", error)
            self._untold.append(report)
            self.failed()
        except NotJoined as error:
            logger.warning("not reported: %s", error)

    def failed(self) -> None:
        """Something has failed that has to be tried again: soon, or when a store that is lost is back. A store that was
        given up is not asked again: each attempt would hold up the end."""
        if self.deadline is None and self.retry_at is None and not self.gave_up:
            self.retry_at = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, RETRY_S_MAX)

    def tell_again(self) -> None:
        """What could not be told, oldest first."""
        self.retry_at = None
        untold, self._untold = self._untold, []
        for report in untold:
            self.tell(report)
        if self.retry_at is None:
            self._pause_s = RETRY_S_MIN

    def forget(self) -> None:
        """What was not told yet is of a membership that is over."""
        self._untold.clear()

    def lost(self, event: StoreLost) -> None:
        logger.warning(
            "%s; running steps go on, membership stands still; the job ends if this lasts %g s",
            event.reason,
            self._limit_s,
        )
        self.retry_at = None
        if self.deadline is None and not self.gave_up:
            self.deadline = time.monotonic() + self._limit_s

    def back(self) -> None:
        logger.warning("the store is back")
        self.deadline = None
        self.tell_again()

    def give_up(self) -> PlatformError:
        """From now on the job ends without the store; the error of a node that cannot end it well."""
        self.deadline, self.gave_up = None, True
        error = PlatformError(
            f"the store did not come back for {self._limit_s:g} s",
            do="start the same command again when it is there: the job resumes from the run directory",
        )
        logger.error("%s", error)
        return error
