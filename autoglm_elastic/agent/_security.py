"""What a connection to a store must be: mutual TLS, or plain on loopback, or plain because somebody asked for it.

May read: the files of the settings. Must never: connect, or fall back to plain.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from autoglm_elastic.coordination import Credentials, TlsFiles
from autoglm_elastic.coordination.etcd import EtcdTarget, encounter
from autoglm_elastic.errors import UsageError
from autoglm_elastic.settings import Settings

_FILES: Final = ("ca", "cert", "key", "server_name")
_INSECURE: Final = "insecure"
_WORDS: Final = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}


@dataclass(frozen=True, slots=True)
class Security:
    """`given`: the settings `tls.*`, "" for none. `insecure`: plain off loopback is wanted."""

    given: tuple[str, ...]
    insecure: bool

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Security:
        """From `--rdzv-conf`, or `options_of`. Raises UsageError."""
        insecure = str(options.get(_INSECURE, "")).lower()
        if insecure not in _WORDS:
            raise UsageError(f"--rdzv-conf {_INSECURE}={insecure!r}", valid="true or false")
        return cls(tuple(str(options.get(name, "")) for name in _FILES), _WORDS[insecure])

    def credentials(self, host: str) -> Credentials | None:
        """For a store that an agent hosts at `host`; None: plain.

        Raises:
            UsageError: files that will not do; or none, where everybody in the network could reach the store.
        """
        files = TlsFiles.given(*self.given)
        if files is not None:
            return Credentials(files)
        if not self.insecure and not is_loopback(host):
            cure = f"autoglm tls init DIR --host {host}, and set tls.ca, tls.cert and tls.key"
            raise _without_tls(f"the store at {host}", cure)
        return None

    def check_etcd(self, target: EtcdTarget) -> None:
        """Raises UsageError as `credentials` does."""
        encounter.check_files(target)
        far = [host for host, _ in target.endpoints if not is_loopback(host.strip("[]"))]
        if far and not target.is_tls and not self.insecure:
            raise _without_tls(f"etcd at {far[0]}", "give ?ca=FILE&cert=FILE&key=FILE in its address")


def options_of(settings: Settings) -> dict[str, str]:
    """The settings, as our rendezvous is told."""
    options = {name: getattr(settings.tls, name) for name in _FILES}
    if settings.store.insecure:
        options[_INSECURE] = "true"
    return {name: value for name, value in options.items() if value}


def is_loopback(host: str) -> bool:
    """Whether that is this machine alone, for certain: a name other than localhost may be anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_tls(what: str, cure: str) -> UsageError:
    return UsageError(
        f"{what} without TLS: whoever reaches it over the network could read and command the job",
        do=f"{cure} (docs/tls.md); or set store.insecure=true",
    )
