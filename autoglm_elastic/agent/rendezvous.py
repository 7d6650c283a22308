"""Rendezvous on our own store: torch's handler interface over a `NodeSession`.

Used by stock `torchrun --rdzv-backend=autoglm` through `next_rendezvous`, and by our agent, which joins and
follows the session's events itself and only calls `enter`. Each generation gets a c10d store that was born
with it, hosted by its first node's agent: no key of an earlier generation can be read. May touch sockets;
never touches workers.
"""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed import Store as C10dStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from autoglm_elastic.agent import _etcd_options
from autoglm_elastic.agent._endpoint import attach
from autoglm_elastic.agent._keys import Keys
from autoglm_elastic.agent._rdzv_conf import check_names, number_of
from autoglm_elastic.agent._security import Security
from autoglm_elastic.agent._sweep import sweep
from autoglm_elastic.agent.session import NodeSession, NotJoined, RunClosed, Superseded, WaitTimeout
from autoglm_elastic.coordination import StoreRefused, SystemClock
from autoglm_elastic.coordination.limits import LEASE_S_MAX, LEASE_S_MIN, RECONNECT_S_MAX
from autoglm_elastic.core.membership import Failure, Generation, Policy
from autoglm_elastic.ports import Clock, StoreUnavailable

log = logging.getLogger(__name__)

BACKEND: Final = "autoglm"
ETCD_BACKEND: Final = "autoglm-etcd"
"""The same with an endpoint of etcd's, for torchrun: `--rdzv-endpoint=host:port,host:port`."""

JOIN_TIMEOUT_S: Final = 600.0
JOIN_WINDOW_S: Final = 2.0
LEASE_S: Final = 2.0
PROGRESS_S: Final = 60.0
RESTARTS_UNLIMITED: Final = 1 << 30
"""Under stock torchrun every agent counts restarts itself; ours gives its own number."""

C10D_CONNECT_S_MAX: Final = 10.0
"""Connecting to a c10d store whose host has just published it."""

LINGER_S_MAX: Final = 5.0
"""How long the store's host serves on at its end, so that the others learn how the run ended and leave
first."""


class AutoglmRendezvousHandler(RendezvousHandler):
    """Hosts or reaches the store at once; joins in `next_rendezvous`, or when our agent calls
    `session.join()`.

    `session`: this node's membership. `endpoint`: "host:port" under which others reach the store.
    `hosts_store`: it lives in this process. `current`: the generation last entered.

    `params.config` (`--rdzv-conf`; strings or numbers): `join_timeout` or `timeout`, `join_window_s`,
    `lease_s`, `first_generation`, `max_restarts`, `max_failures`, `progress_s`, `node`, `nproc`, `role`,
    `is_host`; for TLS `ca`, `cert`, `key`, `server_name`, or `insecure` (docs/tls.md).

    Raises (construction):
        UsageError: an endpoint or option that makes no sense, a store off loopback without TLS, or one that does
            not let us in.
        PlatformError: the store cannot be hosted nor reached.
    """

    def __init__(self, params: RendezvousParameters, *, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._run_id, self._backend = params.run_id, params.backend
        check_names(params.config)
        self._join_timeout_s = number_of(params, "join_timeout", number_of(params, "timeout", JOIN_TIMEOUT_S))
        policy = Policy(
            nodes_min=params.min_nodes,
            nodes_max=params.max_nodes,
            max_restarts=int(number_of(params, "max_restarts", RESTARTS_UNLIMITED)),
            join_window_s=number_of(params, "join_window_s", JOIN_WINDOW_S),
            join_timeout_s=self._join_timeout_s,
            progress_s=number_of(params, "progress_s", PROGRESS_S),
            max_failures=int(number_of(params, "max_failures", 0)),
        )
        node = str(params.get("node") or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}")
        nproc, role = int(number_of(params, "nproc", 1)), str(params.get("role") or "default")
        lease_s = number_of(params, "lease_s", LEASE_S, LEASE_S_MIN, LEASE_S_MAX)
        first_generation = int(number_of(params, "first_generation", 1))
        self._attachment = attach(
            _etcd_options.endpoint_of(params, is_etcd=params.backend == ETCD_BACKEND),
            run_id=params.run_id,
            is_host=params.get_as_bool("is_host"),
            join_timeout_s=self._join_timeout_s,
            local_addr=params.local_addr,
            security=Security.of(params.config),
            clock=self._clock,
        )
        try:
            if self._attachment.is_shared:
                sweep(self._attachment.client, Keys(params.run_id))
            self.session = NodeSession(
                self._attachment.client,
                run_id=params.run_id,
                node=node,
                host=self._attachment.local_host,
                nproc=nproc,
                role=role,
                policy=policy,
                lease_s=lease_s,
                first_generation=first_generation,
                clock=self._clock,
            )
        except BaseException:
            self._attachment.close(0.0)
            raise
        self._attachment.client.on_connection = self.session.connection_changed
        self.endpoint = self._attachment.endpoint
        self.current: Generation | None = None
        self._entered_at = 0.0
        self._c10d_stores: dict[int, TCPStore] = {}
        self._serves_stock_agent = False
        self._is_shut_down = False

    @property
    def hosts_store(self) -> bool:
        return self._attachment.server is not None

    @property
    def speaks_for_job(self) -> bool:
        """Whether this agent tells how the job ended: the host of its store or, where nobody hosts it, the first
        node."""
        if not self._attachment.is_shared:
            return self.hosts_store
        if self.current is None:
            return self.session.is_leader()
        placement = self.current.placement(self.session.node)
        return placement is not None and placement.group_rank == 0

    def store_lost_limit_s(self, shared_s: float) -> float:
        """How long a node that has lost its lease may hope for the store: `shared_s` where nobody hosts it. A hosted
        one is gone with its host; its clients look for it no longer than this."""
        return shared_s if self._attachment.is_shared else min(shared_s, RECONNECT_S_MAX)

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return self._backend

    def get_run_id(self) -> str:
        return self._run_id

    # Our agent's way in

    def enter(self, generation: Generation, timeout_s: float | None = None) -> tuple[C10dStore, str, int]:
        """The c10d store of `generation`, with the address that its workers get as MASTER_ADDR and
        MASTER_PORT.

        This node must be placed in it. The first node hosts the store here. The stores of earlier generations
        live on until `settle`, so that workers that still unwind do not lose theirs.

        Raises:
            Superseded, RunClosed, NotJoined, WaitTimeout, StoreUnavailable.
        """
        timeout_s = self._join_timeout_s if timeout_s is None else timeout_s
        placement = generation.placement(self.session.node)
        if placement is None:
            raise ValueError(f"generation {generation.number} does not place node {self.session.node}")
        if placement.group_rank == 0:
            store, host, port = self._host_c10d(generation)
        else:
            host, port = self.session.wait_c10d(generation.number, timeout_s)
            store = self._connect_c10d(generation, host, port, timeout_s)
        self._c10d_stores[generation.number] = store
        self.current = generation
        self._entered_at = self._clock.monotonic()
        return store, host, port

    def settle(self) -> None:
        """The current generation is in use: drop the c10d stores of the earlier ones."""
        newest = -1 if self.current is None else self.current.number
        for number in [number for number in self._c10d_stores if number < newest]:
            del self._c10d_stores[number]

    def _host_c10d(self, generation: Generation) -> tuple[TCPStore, str, int]:
        """The same one when this is tried again: what became of telling the others of it may not be known."""
        host = self._attachment.local_host
        store = self._c10d_stores.get(generation.number)
        if store is None:
            limit = timedelta(seconds=self._join_timeout_s)
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
            self._c10d_stores[generation.number] = store
        self.session.publish_c10d(generation.number, host, store.port)
        return store, host, store.port

    def _connect_c10d(self, generation: Generation, host: str, port: int, timeout_s: float) -> TCPStore:
        connect_s = min(timeout_s, C10D_CONNECT_S_MAX)
        try:
            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=connect_s))
        except (DistError, RuntimeError) as error:
            log.info("the c10d store of generation %d is gone: %s", generation.number, error)
            # Its host has died, so a new generation is on its way; with none, this times out.
            self.session.wait_sealed(generation.number, timeout_s)
            raise Superseded(generation.number) from error
        store.set_timeout(timedelta(seconds=self._join_timeout_s))
        return store

    # Stock torchrun's way in

    def next_rendezvous(self) -> RendezvousInfo:
        """Called first, after a worker of this node failed, and after `num_nodes_waiting` said that the world
        changes."""
        self._serves_stock_agent = True
        deadline = self._clock.monotonic() + self._join_timeout_s
        try:
            self.session.join()
            self._report_if_broken()
            while True:
                info = self._try_next(deadline - self._clock.monotonic())
                if info is not None:
                    return info
        except RunClosed as error:
            raise RendezvousClosedError(str(error)) from error
        except WaitTimeout as error:
            raise RendezvousTimeoutError(str(error)) from error
        except StoreUnavailable as error:
            raise RendezvousConnectionError(str(error)) from error

    def _report_if_broken(self) -> None:
        """Torchrun does not say why it is here. If no newer generation waits for us, it is because a worker
        failed."""
        newest = self.session.generation()
        if self.current is None or newest is None or newest.number != self.current.number:
            return
        node = self.session.node
        failure = Failure(node, -1, -1, 1, f"a worker of node {node} failed", -1, self._clock.wall())
        self.session.report_broken(newest.number, failure, self._clock.monotonic() - self._entered_at)

    def _try_next(self, timeout_s: float) -> RendezvousInfo | None:
        """One try to get into the newest generation; None when it was over before every node was in."""
        if timeout_s <= 0:
            raise WaitTimeout(f"no generation with this node within {self._join_timeout_s:g} s")
        seen = -1 if self.current is None else self.current.number
        try:
            generation = self.session.wait_sealed(seen, timeout_s)
            if generation.placement(self.session.node) is None:
                self.session.wait_sealed(generation.number, timeout_s)
                return None
            store, host, port = self.enter(generation, timeout_s)
            self.session.report_entered(generation.number)
            self.session.wait_entered(generation, timeout_s)
        except Superseded:
            return None
        except NotJoined:
            self.session.join()
            return None
        self.settle()
        placement = generation.placement(self.session.node)
        return RendezvousInfo(
            PrefixStore(f"agent/{generation.number}", store),
            0 if placement is None else placement.group_rank,
            len(generation.placements),
            RendezvousStoreInfo(host, port),
        )

    def num_nodes_waiting(self) -> int:
        """Whether it is time for `next_rendezvous`, from the watch's cache: a newer generation is sealed
        (newcomers are let in at once, so whoever still waits is one too many), or the lease is lost."""
        newest = self.session.generation()
        if not self.session.is_joined():
            return 1
        if self.current is None or newest is None or newest.number <= self.current.number:
            return 0
        return max(1, len(newest.placements) - len(self.current.placements))

    def is_closed(self) -> bool:
        return self.session.outcome() is not None

    def set_closed(self) -> None:
        self.session.close_run("done", f"closed by node {self.session.node}")

    def shutdown(self) -> bool:
        """Leave; under stock torchrun close the run, as its own backends do. Idempotent."""
        if self._is_shut_down:
            return True
        self._is_shut_down = True
        told = True
        if self._serves_stock_agent and not self.is_closed() and self._attachment.client.is_connected:
            try:
                self.set_closed()
            except StoreUnavailable as error:
                log.info("the run could not be closed: %s", error)
                told = False
        self.session.close()
        if self._attachment.is_shared and self._attachment.client.is_connected:
            try:
                sweep(self._attachment.client, Keys(self._run_id))
            except (StoreUnavailable, StoreRefused) as error:
                log.info("the run's keys are left to expire: %s", error)
        self._attachment.close(LINGER_S_MAX)
        self._c10d_stores.clear()
        return told


def torchrun_handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Entry point of the group `torchrun.handlers`."""
    return AutoglmRendezvousHandler
