"""A node that may no longer count itself as a member: its workers are called off, and it comes back as a new one.

May touch the node's workers and join the session. Must never let a worker train on once others may think this node
dead; must never decide that the job is over.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from autoglm_elastic.agent._group import NodeGroup
from autoglm_elastic.agent._rejoin import Rejoin
from autoglm_elastic.agent.session import NodeSession, NotJoined, RunClosed
from autoglm_elastic.agent.slots import WorkerSlot
from autoglm_elastic.coordination import StoreRefused
from autoglm_elastic.observe import events
from autoglm_elastic.ports import StoreUnavailable

if TYPE_CHECKING:
    from autoglm_elastic.agent.agent import ElasticAgent

logger = logging.getLogger(__name__)

HOLD_FRACTION = 0.1
"""After `FENCE_FRACTION` of the lease, workers have this part of it to come out of their generation."""


class Fence:
    """`rejoin`: when this node tries to come back.

    Args:
        limit_s: for how long it tries.
        read: takes in what a worker has sent.
    """

    def __init__(
        self,
        agent: ElasticAgent,
        session: NodeSession,
        group: NodeGroup,
        *,
        limit_s: float,
        read: Callable[[WorkerSlot], None],
    ) -> None:
        self._agent, self._session, self._group, self._read = agent, session, group, read
        self.rejoin = Rejoin(limit_s)

    def call_off(self, reason: str, *, at_once: bool = False) -> None:
        """No worker of this node trains on. Those that run `elastic.run` keep their state for the next generation that
        counts on this node; others are stopped, `at_once` without grace."""
        group = self._group
        going_on = self._session.outcome() is None and not any(slot.done for slot in group.slots)
        if going_on and group.running and group.can_stay:
            self._hold(reason)
            return
        if at_once:
            group.kill(group.slots)
        group.stop(reason)

    def lost(self, reason: str) -> None:
        """The lease is gone, the workers are called off: from now on it tries to come back, with the state that they
        hold: whether that is still of the lineage, the next plan sees. Raises PlatformError when that was lost too
        often."""
        what = "the workers hold their state" if self._group.held else "stopped the workers"
        logger.warning("lost the membership, %s, will rejoin: %s", what, reason)
        self._agent.emit(events.NodeLeft(node=self._session.node, reason=reason))
        step = max((slot.step_max for slot in self._group.slots), default=-1)
        self.rejoin.lost(reason, step, time.monotonic())

    def try_to_rejoin(self) -> None:
        """Raises PlatformError when that was the last attempt."""
        try:
            self._session.join()
        except RunClosed:
            self.rejoin.done()  # the session's next event says how it ended
        except (StoreUnavailable, StoreRefused, NotJoined) as error:
            logger.info("not rejoined yet: %s", error)
            self.rejoin.failed(error, time.monotonic())
        else:
            self.rejoin.done()
            logger.warning("rejoined the job as a new member")
            self._agent.emit(
                events.NodeJoined(
                    node=self._session.node,
                    nproc=len(self._group.slots),
                    incarnation=self._session.incarnation,
                )
            )

    def _hold(self, reason: str) -> None:
        """Returns when no worker here trains: who is not out of its generation in time is killed."""
        self._group.hold(reason)
        deadline = time.monotonic() + HOLD_FRACTION * self._agent.settings.membership.lease_s
        while (inside := self._group.inside) and (left_s := deadline - time.monotonic()) > 0:
            open_ones = [slot for slot in inside if slot.control_fd >= 0]
            if not open_ones:
                break
            select.select([slot.control_fd for slot in open_ones], [], [], left_s)
            for slot in open_ones:
                self._read(slot)
        self._group.kill(inside)
