"""Who we are on the network: a CA, our certificate and its key, from files, read again when they were rotated.

Both ends of a connection show a certificate of the same CA, in TLS 1.3, or there is no connection. What is wrong with
the files is said when they are first read, in one line; later a set that cannot be used (half of a rotation) is passed
over, and the set before it stays. May touch: the three files. Must never: print, keep or pass on a key.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from autoglm_elastic.coordination._tls_layer import TlsLayer
from autoglm_elastic.coordination.clock import SystemClock
from autoglm_elastic.errors import UsageError

log = logging.getLogger(__name__)

WARN_DAYS: Final = 7.0
"""A certificate that ends so soon is worth a line in the log."""

FILE_BYTES_MAX: Final = 1 << 20
"""A few certificates or a key; anything larger is some other file."""

_ALERT: Final = re.compile(r"^(?:tls|ssl)v\d+ alert ")
"""What OpenSSL writes before what the other end said."""

_Stamp = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. `ca`: certificates that both ends are judged by, one or (while a CA is replaced) several. `cert`:
    ours, with what leads from it to the CA; `key`: of it. `server_name`: what the server's certificate must be made
    out to, "" for the name that it is reached by."""

    ca: str
    cert: str
    key: str
    server_name: str = ""

    @classmethod
    def given(cls, ca: str, cert: str, key: str, server_name: str = "") -> TlsFiles | None:
        """None when no file is given. Raises UsageError when some are and others are not."""
        files = {"tls.ca": ca, "tls.cert": cert, "tls.key": key}
        missing = [name for name, path in files.items() if not path]
        if len(missing) == len(files) and not server_name:
            return None
        if missing:
            there = ", ".join(name for name in files if name not in missing) or "tls.server_name"
            raise UsageError(
                f"{there} without {' and '.join(missing)}",
                do="give all three, or none; autoglm tls init makes them",
            )
        if server_name.startswith("."):
            raise UsageError(
                f"tls.server_name {server_name}", valid="a name or an address in the certificate"
            )
        return cls(ca, cert, key, server_name)


class Credentials:
    """Contexts for new connections, always of the files as they are now. Thread safe.

    Raises (construction):
        UsageError: a file that is not there, cannot be read, does not fit the others, or is open to everybody; a
            certificate that has expired, is not of this CA, or not for this use.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self._lock = threading.Lock()
        self._stamp = _stamp(files)
        self._server, self._client = _contexts(files)
        self._passed_over: _Stamp | None = None
        self._told = ""

    def for_server(self) -> ssl.SSLContext:
        return self._newest()[0]

    def for_client(self) -> ssl.SSLContext:
        return self._newest()[1]

    def require_server(self) -> None:
        """Raises UsageError when our certificate may not be shown by a server."""
        try:
            _shake_hands(self._server, self.files, judged="server")
        except ssl.SSLError as error:
            raise UsageError(
                f"tls.cert {self.files.cert}: no certificate to host the store with: {reason(error)}",
                do="give one for server and client authentication; autoglm tls init makes such",
            ) from error

    def _newest(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        with self._lock:
            try:
                stamp = _stamp(self.files)
                if stamp not in (self._stamp, self._passed_over):
                    self._passed_over = stamp
                    self._server, self._client = _contexts(self.files)
                    self._stamp, self._passed_over, self._told = stamp, None, ""
                    log.info("the certificate of %s is in use for new connections", self.files.cert)
            except UsageError as error:
                if self._told != str(error):  # once, not for every stranger who comes
                    self._told = str(error)
                    log.warning("the certificates before stay in use: %s", error)
            return self._server, self._client


def load_ca(context: ssl.SSLContext, ca: str) -> None:
    """Raises UsageError."""
    try:
        context.load_verify_locations(ca)
    except (ssl.SSLError, OSError) as error:
        raise UsageError(f"tls.ca {ca}: no certificate in it", valid="a PEM file") from error


def load_own(context: ssl.SSLContext, cert: str, key: str) -> None:
    """Our certificate and its key. Raises UsageError."""
    try:
        context.load_cert_chain(cert, key, _refuse_password)
    except _EncryptedKey:
        raise UsageError(
            f"tls.key {key} is encrypted", valid="a key without a password, that only its user can read"
        ) from None
    except (ssl.SSLError, OSError) as error:
        if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"tls.key {key} is not the key of tls.cert {cert}") from error
        raise UsageError(
            f"tls.cert {cert} or tls.key {key}: not a certificate with its key", valid="PEM files"
        ) from error


def check_own(cert: str, key: str) -> None:
    """Of a certificate whose CA is for somebody else to know: everything but that. Raises UsageError."""
    files = TlsFiles(cert, cert, key)
    for name, path in (("tls.cert", cert), ("tls.key", key)):
        _check_readable(name, path)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it is its own authority here
    _load(server, files)
    try:
        shown = _shake_hands(server, files, judged="client")
    except ssl.SSLError as error:
        raise UsageError(
            f"tls.cert {cert} does not hold: {reason(error)}",
            valid="a certificate for client authentication, that has not expired",
        ) from error
    _warn_of_the_end(files, str(shown.get("notAfter", "")))


def reason(error: ssl.SSLError) -> str:
    """What OpenSSL found, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return str(error.verify_message)
    return _ALERT.sub("", (error.reason or str(error)).replace("_", " ").lower())


def _stamp(files: TlsFiles) -> _Stamp:
    """Changes when a file is written, renamed over, or reached through another link. Raises UsageError."""
    found = []
    for name, path in (("tls.ca", files.ca), ("tls.cert", files.cert), ("tls.key", files.key)):
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{name} {path}: {getattr(error, 'strerror', None) or error}",
                valid="a PEM file",
                do="autoglm tls init makes all three",
            ) from error
        found.append((status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)


def _contexts(files: TlsFiles) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server's, client's). Raises UsageError."""
    _check_readable("tls.ca", files.ca)
    _check_readable("tls.cert", files.cert)
    mode = _check_readable("tls.key", files.key)
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise UsageError(
            f"tls.key {files.key} is open to every user of this machine (mode {stat.S_IMODE(mode):04o})",
            do=f"chmod o= {files.key}",
        )
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        _load(context, files)
    # A resumed session would be judged by the CA of the session before.
    server.num_tickets = 0
    try:
        shown = _shake_hands(server, files, judged="client")
    except ssl.SSLError as error:
        raise UsageError(
            f"tls.cert {files.cert} does not hold before tls.ca {files.ca}: {reason(error)}",
            valid="a certificate of that CA, for client authentication, that has not expired",
        ) from error
    _warn_of_the_end(files, str(shown.get("notAfter", "")))
    return server, client


def _warn_of_the_end(files: TlsFiles, not_after: str) -> None:
    left_days = (ssl.cert_time_to_seconds(not_after) - SystemClock().wall()) / 86400
    if left_days < WARN_DAYS:
        log.warning("tls.cert %s ends in %.1f days: nobody can join after that", files.cert, left_days)


def _check_readable(name: str, path: str) -> int:
    """The file's mode."""
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name} {path}: {getattr(error, 'strerror', None) or error}", valid="a readable PEM file"
        ) from error
    if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= FILE_BYTES_MAX:
        raise UsageError(f"{name} {path} is no PEM file", valid=f"a file of 1 to {FILE_BYTES_MAX} bytes")
    return status.st_mode


def _load(context: ssl.SSLContext, files: TlsFiles) -> None:
    load_ca(context, files.ca)
    load_own(context, files.cert, files.key)


class _EncryptedKey(Exception):
    """OpenSSL would ask for a password at the terminal."""


def _refuse_password() -> str:
    raise _EncryptedKey


def _shake_hands(server: ssl.SSLContext, files: TlsFiles, *, judged: str) -> dict[str, Any]:
    """We meet ourselves: `judged` ("client" or "server") is looked at as the other end of a connection would do it.
    Our certificate, as the server sees it. Raises ssl.SSLError."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE if judged == "client" else ssl.CERT_REQUIRED
    _load(client, files)
    near, far = TlsLayer(client, server_side=False), TlsLayer(server, server_side=True)
    near.open(b"")
    while sent := near.seal():
        far.open(sent)
        near.open(far.seal())
    return far.peer()
