"""Who hosts the store of a run, and how the others reach it: the meaning of `--rdzv-endpoint`.

The agent whose machine the endpoint names and that can listen on its port hosts the store; everybody else
connects. An endpoint `etcd://…` is a store of its own that nobody hosts.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torch.distributed.elastic.rendezvous.utils import (
    _matches_machine_hostname,
    parse_rendezvous_endpoint,
)

from autoglm_elastic.agent._keys import Keys
from autoglm_elastic.agent._security import Security, is_loopback
from autoglm_elastic.coordination import Credentials, StoreClient, StoreDenied, StoreServer, etcd
from autoglm_elastic.errors import PlatformError, UsageError
from autoglm_elastic.ports import Clock, StoreUnavailable

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from autoglm_elastic.coordination.etcd.store import EtcdStore

ETCD: Final = f"{etcd.SCHEME}://"

PORT_DEFAULT: Final = 29400
"""torchrun's own."""

REQUEST_S_MAX: Final = 5.0
"""Bound of one store call."""

HOST_WAIT_S: Final = 5.0
"""A port of this machine that is taken but does not answer like our store gets so long: its owner may just
start."""

BACKOFF_S_MIN: Final = 0.05
BACKOFF_S_MAX: Final = 1.0


@dataclass(frozen=True, slots=True)
class Attachment:
    """Our connection to the run's store. `endpoint`: "host:port" for others; `local_host`: this machine, as
    others reach it; `server`: when it is hosted here."""

    client: StoreClient | EtcdStore
    server: StoreServer | None
    endpoint: str
    local_host: str

    @property
    def is_shared(self) -> bool:
        """The store outlives the run, and holds others: what the run leaves in it must be cleared away."""
        return not isinstance(self.client, StoreClient)

    def close(self, linger_s: float) -> None:
        self.client.close()
        if self.server is not None:
            self.server.close(linger_s)


def attach(
    endpoint: str,
    *,
    run_id: str,
    is_host: bool | None,
    join_timeout_s: float,
    local_addr: str | None,
    security: Security,
    clock: Clock,
) -> Attachment:
    """Host or reach the store.

    Raises:
        UsageError: no endpoint that can be understood, or one that belongs to something else, or to another run;
            or `security` does not allow it; or the store does not let us in.
        PlatformError: nobody answers within `join_timeout_s`.
    """
    try:
        if endpoint.startswith(ETCD):
            return _attach_etcd(endpoint, run_id, join_timeout_s, local_addr, security, clock)
        return _attach_tcp(endpoint, run_id, is_host, join_timeout_s, local_addr, security, clock)
    except StoreDenied as error:
        raise UsageError(error.got, do=error.do) from error  # nothing was started


def _attach_tcp(
    endpoint: str,
    run_id: str,
    is_host: bool | None,
    join_timeout_s: float,
    local_addr: str | None,
    security: Security,
    clock: Clock,
) -> Attachment:
    host, port = _host_and_port(endpoint)
    credentials = security.credentials(host)
    if is_host is None:
        is_host = _matches_machine_hostname(host)
    server = _try_to_host(host, port, run_id, credentials) if is_host else None
    if server is not None:
        port = server.address[1]
    reach = _loopback_of(host) if server is not None else host
    wait_s = HOST_WAIT_S if is_host else join_timeout_s
    try:
        client = _connect(reach, port, run_id, min(wait_s, join_timeout_s), (credentials, host), clock)
    except BaseException:
        if server is not None:
            server.close()
        raise
    local_host = local_addr or client.local_host
    if not local_addr and is_loopback(local_host) and not is_loopback(host):
        # We sit beside the store, reached over loopback: the others know this machine by the endpoint's name.
        local_host = host
    return Attachment(client, server, f"{host}:{port}", local_host)


def check(endpoint: str, options: Mapping[str, Any]) -> None:
    """Whether we may go there with these options of `--rdzv-conf`, before anything is started. Raises UsageError."""
    security = Security.of(options)
    if endpoint.startswith(ETCD):
        security.check_etcd(etcd.parse(etcd.with_options(endpoint, options)))
    else:
        security.credentials(_host_and_port(endpoint)[0])


def _host_and_port(endpoint: str) -> tuple[str, int]:
    try:
        return parse_rendezvous_endpoint(endpoint, PORT_DEFAULT)
    except ValueError as error:
        raise UsageError(f"--rdzv-endpoint {endpoint!r}: {error}", valid="HOST or HOST:PORT") from None


def _attach_etcd(
    endpoint: str,
    run_id: str,
    join_timeout_s: float,
    local_addr: str | None,
    security: Security,
    clock: Clock,
) -> Attachment:
    target = etcd.parse(endpoint)
    security.check_etcd(target)
    from autoglm_elastic.coordination.etcd.store import EtcdStore

    began_at, timeout_s = clock.monotonic(), min(REQUEST_S_MAX, join_timeout_s)
    tell_at = began_at
    while True:
        try:
            store = EtcdStore(target, timeout_s=timeout_s, prefix=Keys(run_id).prefix, clock=clock)
        except StoreUnavailable as error:
            now = clock.monotonic()
            if now < began_at + join_timeout_s:
                if now >= tell_at:
                    tell_at = now + (now - began_at)  # twice as long until the next line each time
                    log.warning("%s; trying on until %g s have passed", error, join_timeout_s)
                continue
            raise PlatformError(
                f"{error} (for {join_timeout_s:g} s)",
                do="check that etcd runs and that this machine can reach it",
            ) from error
        return Attachment(store, None, endpoint, local_addr or store.local_host)


def _try_to_host(host: str, port: int, run_id: str, credentials: Credentials | None) -> StoreServer | None:
    """None: somebody listens there already."""
    try:
        listen = _loopback_of(host) if is_loopback(host) else ""
        return StoreServer(listen, port, realm=run_id, credentials=credentials)
    except PlatformError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
            return None
        raise


def _connect(
    host: str, port: int, run_id: str, wait_s: float, shown: tuple[Credentials | None, str], clock: Clock
) -> StoreClient:
    """`shown`: our credentials, and the name in the server's certificate."""
    give_up_at = clock.monotonic() + wait_s
    backoff_s = BACKOFF_S_MIN
    while True:
        try:
            return StoreClient(
                host, port, timeout_s=REQUEST_S_MAX, realm=run_id, credentials=shown[0], peer_name=shown[1]
            )
        except PlatformError as error:
            # Somebody answers who will never be our store: nothing was started, the flag is wrong.
            raise UsageError(error.got, do=error.do) from error
        except StoreUnavailable as error:
            remaining_s = give_up_at - clock.monotonic()
            if remaining_s <= 0:
                raise PlatformError(
                    f"nobody serves the run's store for {wait_s:g} s: {error}",
                    do="start the agent that --rdzv-endpoint names, or check that this machine can reach it",
                ) from error
        # Nothing tells when a remote process begins to listen.
        time.sleep(min(backoff_s, remaining_s))
        backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)


def _loopback_of(host: str) -> str:
    return host if is_loopback(host) and host != "localhost" else "127.0.0.1"
