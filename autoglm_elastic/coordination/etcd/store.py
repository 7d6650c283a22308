"""`ports.Store` on etcd v3. Thread safe; every call is bounded.

What it adds to etcd's own API: JSON, our limits, fail-over (`_transport.py`), watches that resume
(`_watch.py`), leases that outlive the loss of etcd (`_leases.py`), and an end for what a job leaves behind:
keys without a lease of their own are put under a lease of the job's, which its agents renew now and then.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from autoglm_elastic.coordination.checks import check_lease, check_txn
from autoglm_elastic.coordination.clock import SystemClock
from autoglm_elastic.coordination.etcd import encounter
from autoglm_elastic.coordination.etcd._leases import Leases
from autoglm_elastic.coordination.etcd._link import Link
from autoglm_elastic.coordination.etcd._package import etcdrpc, transactions, utils
from autoglm_elastic.coordination.etcd._transport import Compacted, Transport
from autoglm_elastic.coordination.etcd._watch import EtcdWatch, from_json
from autoglm_elastic.coordination.etcd.target import EtcdTarget
from autoglm_elastic.coordination.refusals import LeaseGone, StoreRefused
from autoglm_elastic.ports import (
    Clock,
    Compare,
    Delete,
    Entry,
    Json,
    Outcome,
    Put,
    StoreUnavailable,
    Txn,
    WatchEvent,
)

PAGE_KEYS: Final = 1000
"""Keys of a prefix that are read at a time."""

REREADS_MAX: Final = 3
"""How often a prefix is read anew because its revision was compacted while it was read."""

JOB_LEASE_S: Final = 3600
JOB_RENEW_S: Final = 600.0
"""What a job has written is gone so long after its last agent; agents renew it so often."""

CLOSE_S_MAX: Final = 5.0


class EtcdStore:
    """Connects on construction.

    Args:
        target: where etcd is.
        timeout_s: bound of every call.
        prefix: under which all keys of this job are, such as "/autoglm/job7/"; those without a lease of their own end
            with the job's. "" keeps them for ever.
        looks_on: nothing will be written, and no lease of the job's is kept alive.
        on_connection: called with False when no member answers any more and True when one does; must not call
            the store.

    Raises:
        StoreUnavailable: no member answers.
        StoreDenied: wrong user, password or role; or etcd and we do not accept each other's certificates.
        UsageError: a TLS or password file that cannot be read.
    """

    def __init__(
        self,
        target: EtcdTarget,
        *,
        timeout_s: float = 5.0,
        prefix: str = "",
        looks_on: bool = False,
        on_connection: Callable[[bool], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.target = target
        self._transport = Transport(target, timeout_s=timeout_s, clock=clock or SystemClock())
        self._transport.on_connection = on_connection
        self._transport.on_doubt = self._doubt
        self._leases = Leases(self._transport)
        self._watches: list[EtcdWatch] = []
        self._lock = threading.Lock()
        self._prefix = prefix
        self._job_lease = _job_lease(prefix) if prefix and not looks_on else 0
        self._keeper: threading.Thread | None = None
        try:
            # A read, because that is what shows whether we may.
            self.get(prefix or "/")
            self._leases.learn_members()
            if self._job_lease:
                self._grant_job_lease()
        except StoreUnavailable as error:
            self._transport.close()
            raise encounter.denial(target) or error from error
        except BaseException:
            self._transport.close()
            raise
        if self._job_lease:
            self._keeper = threading.Thread(target=self._keep_job, name="autoglm-etcd-job", daemon=True)
            self._keeper.start()

    @property
    def on_connection(self) -> Callable[[bool], None] | None:
        return self._transport.on_connection

    @on_connection.setter
    def on_connection(self, callback: Callable[[bool], None] | None) -> None:
        self._transport.on_connection = callback

    @property
    def is_connected(self) -> bool:
        return self._transport.is_connected

    @property
    def operations(self) -> Counter[str]:
        """Requests sent to etcd so far, by name (`KV.Txn`), attempts and probes included."""
        return self._transport.operations.copy()

    @property
    def local_host(self) -> str:
        """The address of this machine on the way to etcd: one that others can reach, if any member is elsewhere."""
        found = [address for address in map(_address_towards, self.target.endpoints) if address]
        outside = (address for address in found if not ipaddress.ip_address(address).is_loopback)
        return next(outside, found[0] if found else "127.0.0.1")

    # The port

    def get(self, key: str) -> Entry | None:
        answer = self._transport.call("KV.Range", etcdrpc.RangeRequest(key=key.encode()), repeatable=True)
        return self._entry(answer.kvs[0]) if answer.kvs else None

    def get_prefix(self, prefix: str) -> tuple[list[Entry], int]:
        for _ in range(REREADS_MAX):
            try:
                return self._read_prefix(prefix)
            except Compacted:
                continue
        raise StoreUnavailable(
            f"{prefix} could not be read: etcd compacts faster than it answers", sent=False
        )

    def put(self, key: str, value: Json, *, lease: int = 0) -> int:
        return self.txn((), (Put(key, value, lease),)).revision

    def delete(self, key: str) -> bool:
        check_txn((), (Delete(key),))
        request = etcdrpc.DeleteRangeRequest(key=key.encode())
        return bool(self._transport.call("KV.DeleteRange", request, repeatable=False).deleted)

    def txn(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Txn:
        prepared = check_txn(compares, operations)
        keys = sorted({compare.key for compare in compares})
        request = etcdrpc.TxnRequest(
            compare=[(transactions.Mod(each.key) == each.mod_revision).build_message() for each in compares],
            success=[self._operation(*each) for each in prepared],
            failure=[_range(key) for key in keys],
        )
        if not prepared:
            # Without an operation a member answers from what it has, which may be old.
            request.success.append(_range(keys[0] if keys else self._prefix or "/"))
        answer = self._settle_job_lease(
            lambda: self._transport.call("KV.Txn", request, repeatable=not prepared)
        )
        if answer.succeeded:
            return Txn(Outcome.OK, answer.header.revision)
        found = [self._entry(kv) for response in answer.responses for kv in response.response_range.kvs]
        return Txn(Outcome.CONFLICT, answer.header.revision, tuple(found))

    def lease_grant(self, ttl_s: float) -> int:
        """etcd knows whole seconds: the lease is as long as asked for, or longer."""
        check_lease(ttl_s)
        asked_at, lease = self._transport.clock.monotonic(), secrets.randbits(62) | 1
        granted_s = self._grant(lease, math.ceil(ttl_s))
        self._leases.granted(lease, granted_s, asked_at)
        return lease

    def lease_keep_alive(self, lease: int) -> float:
        return self._leases.renew(lease)

    def lease_revoke(self, lease: int) -> None:
        self._leases.forget(lease)
        try:
            self._transport.call("Lease.LeaseRevoke", etcdrpc.LeaseRevokeRequest(ID=lease), repeatable=True)
        except LeaseGone:
            return

    def watch(self, prefix: str, from_revision: int, on_event: Callable[[WatchEvent], None]) -> EtcdWatch:
        """`on_event` runs in a thread of the watch's own."""
        if self._transport.closing.is_set():
            raise StoreUnavailable("the store is closed", sent=False)
        with self._lock:
            watch = EtcdWatch(self._transport, prefix, from_revision, on_event, self._forget)
            self._watches.append(watch)
        return watch

    def close(self) -> None:
        with self._lock:
            watches, self._watches = self._watches, []
        self._transport.close()
        for watch in watches:
            watch.close()
        if self._keeper is not None and threading.current_thread() is not self._keeper:
            self._keeper.join(CLOSE_S_MAX)

    # Inside

    def _read_prefix(self, prefix: str) -> tuple[list[Entry], int]:
        start, end = prefix.encode(), utils.increment_last_byte(prefix.encode())
        entries: list[Entry] = []
        revision = 0
        while True:
            request = etcdrpc.RangeRequest(key=start, range_end=end, limit=PAGE_KEYS, revision=revision)
            answer = self._transport.call("KV.Range", request, repeatable=True)
            revision = revision or answer.header.revision
            entries += [self._entry(kv) for kv in answer.kvs]
            if not answer.more:
                return entries, revision
            start = answer.kvs[-1].key + b"\0"

    def _operation(self, key: str, data: bytes | None, lease: int) -> Any:
        if data is None:
            delete = etcdrpc.DeleteRangeRequest(key=key.encode())
            return etcdrpc.RequestOp(request_delete_range=delete)
        put = etcdrpc.PutRequest(key=key.encode(), value=data, lease=lease or self._job_lease)
        return etcdrpc.RequestOp(request_put=put)

    def _entry(self, kv: Any) -> Entry:
        lease = 0 if kv.lease == self._job_lease else kv.lease
        return Entry(
            kv.key.decode(errors="replace"), from_json(kv.value), kv.create_revision, kv.mod_revision, lease
        )

    def _grant(self, lease: int, ttl_s: int) -> int:
        request = etcdrpc.LeaseGrantRequest(TTL=ttl_s, ID=lease)
        try:
            return int(self._transport.call("Lease.LeaseGrant", request, repeatable=True).TTL)
        except StoreRefused as error:
            if "lease already exists" not in str(error):
                raise
            return ttl_s

    def _grant_job_lease(self) -> None:
        self._grant(self._job_lease, JOB_LEASE_S)

    def _settle_job_lease(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except LeaseGone:
            # The job's own, when all its agents were cut off for an hour; or the caller's, and then it is gone still.
            if not self._job_lease:
                raise
            self._grant_job_lease()
            return call()

    def _keep_job(self) -> None:
        while not self._transport.closing.wait(JOB_RENEW_S):
            try:
                if self.lease_keep_alive(self._job_lease) == 0:
                    self._grant_job_lease()
                self._leases.learn_members()
            except (StoreUnavailable, StoreRefused):
                continue

    def _doubt(self, link: Link) -> None:
        with self._lock:
            watches = list(self._watches)
        for watch in watches:
            watch.suspect(link)

    def _forget(self, watch: EtcdWatch) -> None:
        with self._lock:
            if watch in self._watches:
                self._watches.remove(watch)


def _address_towards(endpoint: tuple[str, int]) -> str:
    """This machine's, or "" when there is no way."""
    host, port = endpoint
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _range(key: str) -> Any:
    return etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=key.encode()))


def _job_lease(prefix: str) -> int:
    """The same for every agent of the job; etcd lets clients choose."""
    return int.from_bytes(hashlib.sha256(prefix.encode()).digest()[:7], "big") | 1
