"""What agent and zygote say to each other: packets of JSON and file descriptors, over one SOCK_SEQPACKET pair.

A request's body travels in a memory file, since an environment may be larger than a packet. Both ends are of
the same installation and user, but sizes are checked all the same. Standard `json`, not msgspec: command
lines and environments may hold bytes that are no UTF-8, which Python shows as lone surrogates.
"""

from __future__ import annotations

import array
import json
import os
import socket
from typing import Any, Final

BODY_BYTES_MAX: Final = 16 * 1024 * 1024
"""Linux limits a process's arguments and environment to 6 MiB (3/4 of the default stack limit, 8 MiB)."""

PACKET_BYTES_MAX: Final = 64 * 1024
FDS_MAX: Final = 64
"""stdin, stdout, stderr, body, status pipe and what is passed on; the kernel's limit is 253."""


def send(control: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
    """One small packet. Raises OSError when the other end is gone."""
    data = json.dumps(message).encode()
    if len(data) > PACKET_BYTES_MAX or len(fds) > FDS_MAX:
        raise ValueError(
            f"packet of {len(data)} bytes, {len(fds)} descriptors; at most {PACKET_BYTES_MAX}, {FDS_MAX}"
        )
    control.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])


def receive(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next packet and its descriptors (close-on-exec), or None when the other end is gone."""
    try:
        data, fds, _flags, _address = socket.recv_fds(
            control, PACKET_BYTES_MAX, FDS_MAX, socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionError:
        return None
    if not data:
        return None
    message: dict[str, Any] = json.loads(data)
    return message, list(fds)


def body_to_fd(body: dict[str, Any]) -> int:
    """A memory file with `body` as JSON; the caller closes it."""
    data = json.dumps(body).encode()
    if len(data) > BODY_BYTES_MAX:
        raise ValueError(f"a request of {len(data)} bytes; at most {BODY_BYTES_MAX}")
    fd = os.memfd_create("autoglm-spawn", os.MFD_CLOEXEC)
    with open(os.dup(fd), "wb") as file:
        file.write(data)
    return fd


def body_from_fd(fd: int) -> dict[str, Any]:
    """The inverse of `body_to_fd`."""
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        data = file.read(BODY_BYTES_MAX + 1)
    if len(data) > BODY_BYTES_MAX:
        raise ValueError(f"a request of more than {BODY_BYTES_MAX} bytes")
    body: dict[str, Any] = json.loads(data)
    return body
