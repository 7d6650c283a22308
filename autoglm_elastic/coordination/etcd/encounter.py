"""What stands between us and etcd's members: our files, their certificates, or TLS where the other end has none.

gRPC says of all of it that nobody answers, and goes on trying. So members that "do not answer" are met once more over
a connection of our own, whose end tells why. May touch: the files of the address, one connection a member. Must never
send a request."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Final

from autoglm_elastic.coordination import tls
from autoglm_elastic.coordination.etcd.target import EtcdTarget, read
from autoglm_elastic.coordination.refusals import StoreDenied

MEET_S: Final = 2.0
"""Bound of each wait for one member."""

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What every HTTP/2 connection begins with; in TLS 1.3 a server judges our certificate only after its own greeting."""

_FRAME_HEADER_BYTES: Final = 9
_SETTINGS: Final = 4


class _Silent(Exception):
    """Nobody is there, or nothing can be said about it."""


def check_files(target: EtcdTarget) -> None:
    """Raises UsageError for a file of `target` that will not do, whoever etcd is."""
    for path, what in ((target.ca, "CA"), (target.cert, "certificate"), (target.key, "key")):
        if path:
            read(path, f"etcd's {what}")
    _context(target)
    if target.cert:
        tls.check_own(target.cert, target.key)


def denial(target: EtcdTarget) -> StoreDenied | None:
    """Why all members that can be reached will never be ours as things are; None when that cannot be said."""
    found: list[StoreDenied] = []
    for host, port in target.endpoints:
        try:
            why = _meet(host.strip("[]"), port, target)
        except _Silent:
            continue
        if why is None:
            return None
        found.append(why)
    return found[0] if found else None


def _context(target: EtcdTarget) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if not target.is_tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    context.set_alpn_protocols(["h2"])
    if target.ca:
        tls.load_ca(context, target.ca)
    else:
        context.load_default_certs()
    if target.cert:
        tls.load_own(context, target.cert, target.key)
    return context


def _meet(host: str, port: int, target: EtcdTarget) -> StoreDenied | None:
    """None: it lets us in, as far as TLS goes. Raises _Silent."""
    where = f"etcd at {host}:{port}"
    if _is_plain(host, port):
        return _has_no_tls(where) if target.is_tls else None
    try:
        with (
            contextlib.closing(socket.create_connection((host, port), MEET_S)) as plain,
            _context(target).wrap_socket(plain, server_hostname=target.server_name or host) as secure,
        ):
            if target.is_tls:
                secure.sendall(_PREFACE)
                if not secure.recv(1):
                    raise _Silent
    except ssl.SSLError as error:
        return _judged(where, target, error)
    except OSError as error:
        raise _Silent from error
    return None if target.is_tls else _wants_tls(where)


def _is_plain(host: str, port: int) -> bool:
    """Whether it greets in HTTP/2 without TLS. Raises _Silent when nobody is there."""
    try:
        with contextlib.closing(socket.create_connection((host, port), MEET_S)) as plain:
            plain.sendall(_PREFACE)
            greeting = plain.recv(_FRAME_HEADER_BYTES)
    except (TimeoutError, ConnectionResetError):
        return False
    except OSError as error:
        raise _Silent from error
    return len(greeting) == _FRAME_HEADER_BYTES and greeting[3] == _SETTINGS


def _judged(where: str, target: EtcdTarget, error: ssl.SSLError) -> StoreDenied | None:
    if not target.is_tls:
        if "ALERT" in (error.reason or ""):
            return _wants_tls(where)
        raise _Silent from error
    if isinstance(error, ssl.SSLCertVerificationError):
        return StoreDenied(
            f"{where} has a certificate that we do not accept: {tls.reason(error)}",
            do="give ca=FILE that it is of, and server_name=NAME where it is made out to another name (docs/etcd.md)",
        )
    if "ALERT" not in (error.reason or ""):
        raise _Silent from error
    shown = "our certificate" if target.cert else "us without a certificate"
    return StoreDenied(
        f"{where} does not accept {shown}: {tls.reason(error)}",
        do="give cert=FILE and key=FILE of the CA that etcd trusts (--trusted-ca-file; docs/etcd.md)",
    )


def _wants_tls(where: str) -> StoreDenied:
    return StoreDenied(f"{where} speaks TLS only", do="give ca=FILE, cert=FILE and key=FILE (docs/etcd.md)")


def _has_no_tls(where: str) -> StoreDenied:
    return StoreDenied(
        f"{where} does not speak TLS", do="give its port for TLS, or leave ca, cert, key and tls.* out"
    )
