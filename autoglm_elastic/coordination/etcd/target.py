"""What `etcd://…` means: endpoints, TLS files, user. Parses and reads files; connects to nothing.

    etcd://[USER@]HOST[:PORT][,HOST[:PORT]…][?ca=FILE&cert=FILE&key=FILE&server_name=NAME&password_file=FILE]

A password is read from `password_file` or the environment, never from the address: command lines are public.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, parse_qsl, urlencode

from autoglm_elastic.errors import UsageError

SCHEME: Final = "etcd"
PORT_DEFAULT: Final = 2379
PASSWORD_VARIABLE: Final = "AUTOGLM_ETCD_PASSWORD"  # noqa: S105 - the variable's name
ENDPOINTS_MAX: Final = 16
FILE_BYTES_MAX: Final = 1 << 20
"""A certificate chain, a key or a password; anything larger is some other file."""

VALID: Final = "etcd://[user@]host:port[,host:port…][?ca=FILE&cert=FILE&key=FILE&password_file=FILE]"
_OPTIONS: Final = ("ca", "cert", "key", "server_name", "user", "password_file")
_ENDPOINT: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:/@\s]+)(?::(?P<port>\d{1,5}))?")


@dataclass(frozen=True, slots=True)
class EtcdTarget:
    """Where etcd is and who we are to it. `endpoints`: `(host, port)` of its members. `ca`, `cert`, `key`: PEM
    files, "" for none; any of them means TLS. `server_name`: what the members' certificates are made out to, "" for the
    host. `password` is never shown."""

    endpoints: tuple[tuple[str, int], ...]
    ca: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password_file: str = ""
    server_name: str = ""

    @property
    def is_tls(self) -> bool:
        return bool(self.ca or self.cert)

    @property
    def address(self) -> str:
        """The endpoints, for people."""
        return ",".join(f"{host}:{port}" for host, port in self.endpoints)

    def password(self, environ: Mapping[str, str] | None = None) -> str:
        """Raises `UsageError` when there is a user and none was given."""
        if not self.user:
            return ""
        if self.password_file:
            return read(self.password_file, "etcd's password").decode(errors="replace").rstrip("\r\n")
        found = (os.environ if environ is None else environ).get(PASSWORD_VARIABLE)
        if found is None:
            raise UsageError(
                f"etcd user {self.user} without a password",
                do=f"give password_file=FILE in the address, or set {PASSWORD_VARIABLE}",
            )
        return found


def parse(text: str) -> EtcdTarget:
    """Raises `UsageError` for what is no such address."""
    address = text.removeprefix(f"{SCHEME}://")
    address, _, query = address.partition("?")
    user, at, hosts = address.rpartition("@")
    if ":" in user:
        raise UsageError(
            "a password in the address of etcd, where everybody can see it",
            do=f"give password_file=FILE in the address, or set {PASSWORD_VARIABLE}",
        )
    endpoints = tuple(_endpoint(each, text) for each in hosts.rstrip("/").split(","))
    if len(endpoints) > ENDPOINTS_MAX or len(set(endpoints)) != len(endpoints):
        raise UsageError(
            f"{len(endpoints)} endpoints in {text}", valid=f"at most {ENDPOINTS_MAX}, each once; {VALID}"
        )
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS or not value or name in options:
            raise UsageError(f"{name}={value} in {text}", valid=VALID)
        options[name] = value
    if at:
        options["user"] = user
    target = EtcdTarget(endpoints, **options)
    if bool(target.cert) != bool(target.key):
        raise UsageError("a certificate without its key, or the reverse", valid="cert=FILE and key=FILE")
    return target


def with_options(address: str, options: Mapping[str, object]) -> str:
    """`address` of etcd, with those of `options` (others are passed over) that it does not give itself."""
    there = parse_qs(address.partition("?")[2], keep_blank_values=True)
    more = {name: str(options[name]) for name in _OPTIONS if name in options and name not in there}
    return address + (("&" if "?" in address else "?") + urlencode(more) if more else "")


def read(path: str, what: str) -> bytes:
    """A small file. Raises `UsageError`."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"{what}: {path}: {error.strerror or error}", valid="a readable file") from error
    if not data or len(data) > FILE_BYTES_MAX:
        raise UsageError(f"{what}: {path} has {len(data)} bytes or more", valid=f"1 to {FILE_BYTES_MAX}")
    return data


def _endpoint(text: str, whole: str) -> tuple[str, int]:
    match = _ENDPOINT.fullmatch(text)
    port = int(match["port"] or PORT_DEFAULT) if match else 0
    if match is None or not 0 < port < 65536:
        raise UsageError(f"{text!r} in {whole}", valid=VALID)
    return match["host"], port
