"""The agent's line to the keeper of its node: there is one while the job runs, and it knows when the job ends.

May touch: the keeper, one thread. Must never delay or end the job: without a keeper the ranks write their
snapshots themselves."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any, Final

from autoglm_elastic import wire
from autoglm_elastic.keeper import AGENT, Keeper, KeeperGone
from autoglm_elastic.observe import events
from autoglm_elastic.settings import Settings

STARTS_MAX: Final = 10
"""Keepers that may die in one job before the agent starts no more; the ranks still ask for one at every
snapshot."""
CLOSE_S: Final = 60.0
"""How long the end of the job waits for this thread: at most a keeper's start."""


class NodeKeeper:
    """Keeps one keeper on this node from `__enter__` to `__exit__`, by a thread of its own.

    Args:
        url: where the snapshots lie.
        node: a name that a restarted agent of this node has, too; told to the workers by the environment.
    """

    def __init__(self, url: str, node: str, settings: Settings, log: events.EventLog) -> None:
        self._url, self._node, self._settings, self._log = url, node, settings, log
        self._lock = threading.Lock()
        self._ended = False
        self._keeper: Keeper | None = None
        self._thread = threading.Thread(target=self._keep, name="autoglm-keeper", daemon=True)

    def __enter__(self) -> NodeKeeper:
        os.environ[wire.ENV_NODE] = self._node
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended, keeper = True, self._keeper
        if keeper is not None:
            keeper.close()
        self._thread.join(timeout=CLOSE_S)

    def _keep(self) -> None:
        for _ in range(STARTS_MAX):
            try:
                keeper = Keeper.ensure(
                    self._url,
                    rank=AGENT,
                    node=self._node,
                    settings=self._settings.keeper,
                    on_told=self._on_told,
                )
            except KeeperGone as error:
                self._log.emit(events.KeeperMissing(rank=AGENT, reason=str(error)))
                return
            with self._lock:
                self._keeper, ended = keeper, self._ended
            if ended:
                keeper.close()
                return
            keeper.wait_gone()
            if self._ended:
                return
            self._log.emit(events.KeeperMissing(rank=AGENT, reason=keeper.gone))

    def _on_told(self, name: str, fields: dict[str, Any]) -> None:
        self._log.emit_named(name, fields)


def name_of_node(given: str | None) -> str:
    """The user's own name for this node, or else its host's: an agent that is started again has the same."""
    return given or socket.gethostname()
