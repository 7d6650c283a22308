"""The first words with a keeper: who we are, and whether it serves us."""

from __future__ import annotations

import os
import socket
from time import monotonic

import msgspec

from autoglm_elastic import wire
from autoglm_elastic.errors import ElasticError
from autoglm_elastic.keeper import address, messages
from autoglm_elastic.keeper._pending import KeeperGone
from autoglm_elastic.keeper.messages import one_line


def path_of(url: str, node: str | None) -> str:
    return address.socket_path(url, node or os.environ.get(wire.ENV_NODE) or socket.gethostname())


def greet(connection: socket.socket, url: str, rank: int, timeout_s: float) -> int | None:
    """The keeper's process id; None when it just ended. Raises KeeperGone when it does not want us."""
    deadline = monotonic() + timeout_s
    frames = messages.Frames()
    try:
        address.peer_of(connection)
        hello = messages.Hello(messages.PROTOCOL, address.our_version(), url, rank)
        connection.sendall(messages.frame(hello))
        while (frame := frames.next()) is None:
            connection.settimeout(max(0.01, deadline - monotonic()))
            data, fds = messages.receive(connection, 1 << 16)
            for fd in fds:
                os.close(fd)
            if not data:
                connection.close()
                return None
            frames.feed(data)
        reply = messages.REPLIES.decode(frame[0])
    except (ConnectionError, BrokenPipeError):
        connection.close()
        return None
    except (OSError, ElasticError, msgspec.MsgspecError) as error:
        connection.close()
        raise KeeperGone(f"the keeper did not answer: {one_line(error)}") from error
    connection.settimeout(timeout_s)
    if isinstance(reply, messages.Welcome):
        return reply.pid
    connection.close()
    reason = reply.reason if isinstance(reply, messages.Refused) else type(reply).__name__
    raise KeeperGone(f"the keeper refuses to serve us: {reason}")
