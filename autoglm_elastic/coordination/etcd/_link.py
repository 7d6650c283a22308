"""One member of etcd and our channel to it."""

from __future__ import annotations

import enum
import socket
from typing import Any, Final

from autoglm_elastic.coordination.etcd._errors import is_silence
from autoglm_elastic.coordination.etcd._package import etcdrpc, grpc
from autoglm_elastic.coordination.etcd.target import EtcdTarget, read

MESSAGE_BYTES_MAX: Final = 64 << 20
"""One answer: a page of a prefix, or what a watch has to catch up with."""

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.keepalive_time_ms", 10_000),  # etcd takes pings closer than 5 s for an attack
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),  # whether a call may be repeated is ours to know
)
_NAME_OPTION: Final = "grpc.ssl_target_name_override"


class Standing(enum.Enum):
    """What a member was found to be."""

    DEAD = "its host says that nobody listens there"
    FOLLOWER = "it answers, and is not the leader"
    LEADER = "it answers, and is the leader"
    SILENT = "no answer"


class Link:
    """`member_id`: 0 until it has answered. `answered_at`: when it last answered anything (monotonic seconds)."""

    def __init__(self, host: str, port: int, target: EtcdTarget) -> None:
        self.host, self.port = host, port
        self.member_id = 0
        self.answered_at = float("-inf")
        self.dead_at = float("-inf")
        """When it was last found dead."""
        self._target = target
        self.open()

    @property
    def where(self) -> str:
        return f"{self.host}:{self.port}"

    def open(self) -> None:
        """A fresh channel; certificates are read again, since they may have been renewed."""
        target, address = self._target, f"dns:///{self.where}"
        if target.is_tls:
            ca, cert, key = (
                read(path, f"etcd's {what}") if path else None
                for path, what in ((target.ca, "CA"), (target.cert, "certificate"), (target.key, "key"))
            )
            name = ((_NAME_OPTION, target.server_name),) if target.server_name else ()
            self._channel = grpc.secure_channel(
                address, grpc.ssl_channel_credentials(ca, key, cert), (*_OPTIONS, *name)
            )
        else:
            self._channel = grpc.insecure_channel(address, _OPTIONS)
        self._stubs = {
            name: getattr(etcdrpc, f"{name}Stub")(self._channel)
            for name in ("KV", "Lease", "Watch", "Cluster", "Maintenance", "Auth")
        }

    def close(self) -> None:
        self._channel.close()

    def method(self, name: str) -> Any:
        """The stub's callable of `Service.Method`."""
        service, _, method = name.partition(".")
        return getattr(self._stubs[service], method)

    def look(self, timeout_s: float, now: float) -> Standing:
        """What this member is now. `DEAD` and `FOLLOWER` are certain: it does not lead at the moment of the probe."""
        standing = self._look(timeout_s)
        if standing is Standing.DEAD:
            self.dead_at = now
        return standing

    def _look(self, timeout_s: float) -> Standing:
        try:
            # Not the channel's word, which may be from before.
            with socket.create_connection((self.host.strip("[]"), self.port), timeout_s):
                pass
        except ConnectionRefusedError:
            return Standing.DEAD
        except OSError:
            return Standing.SILENT
        try:
            # Without the demand for a leader: that there is none is what we want to hear.
            status = self.method("Maintenance.Status")(
                etcdrpc.StatusRequest(), timeout=timeout_s, wait_for_ready=True
            )
        except grpc.RpcError:
            return Standing.SILENT
        self.member_id = status.header.member_id
        return Standing.LEADER if status.leader == self.member_id else Standing.FOLLOWER

    def is_alive(self, timeout_s: float, metadata: Any) -> bool:
        """Whether it answers at all, be it with no."""
        try:
            self.method("Maintenance.Status")(etcdrpc.StatusRequest(), timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            return not is_silence(error)
        return True
