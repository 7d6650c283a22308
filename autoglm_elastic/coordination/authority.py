"""A CA of one's own, for development and for jobs without another: `ca.pem`, and `cert.pem` with `key.pem`, which every
node of a job can use, as server and as client. May touch: these files and `ca-key.pem`, in one folder. Must never:
overwrite a CA, or leave a key that others can read."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from autoglm_elastic.coordination.clock import SystemClock
from autoglm_elastic.errors import PlatformError, UsageError
from autoglm_elastic.ports import Clock

CA, CA_KEY, CERT, KEY = "ca.pem", "ca-key.pem", "cert.pem", "key.pem"
DAYS_MAX: Final = 3650
CA_DAYS: Final = DAYS_MAX
"""The CA outlives its certificates: they are renewed, it is replaced."""

HOSTS_MAX: Final = 10_000
LOCAL: Final = ("localhost", "127.0.0.1", "::1")
"""In every certificate: agents and `autoglm status` on the machine of the store reach it so."""

_EARLIER: Final = datetime.timedelta(hours=1)
"""Clocks of nodes differ."""


def make(folder: Path, hosts: Sequence[str], days: int, clock: Clock | None = None) -> None:
    """A CA and its first certificate, made out to `hosts` (names or addresses) and to this machine's loopback.

    Raises:
        UsageError: there is one already; a name that is none.
        PlatformError: the folder cannot be written to.
    """
    names = _names(hosts)
    there = [name for name in (CA, CA_KEY, CERT, KEY) if os.path.lexists(folder / name)]
    if there:
        raise UsageError(
            f"{folder} has a {there[0]}",
            do="autoglm tls renew makes another certificate of its CA; or give a new folder",
        )
    lasts = _lasts(days, clock)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "autoglm")])
    identity = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(name, name, key, _lasts(CA_DAYS, clock))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identity, critical=False)
        .sign(key, hashes.SHA256())
    )
    with _writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(folder / CA_KEY, _pem(key), 0o600)
        _write(folder / CA, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        _issue(folder, names, certificate, key, lasts)


def renew(folder: Path, hosts: Sequence[str], days: int, clock: Clock | None = None) -> None:
    """Another certificate and key of the CA in `folder`, in place of those there. Without `hosts` it is made out to the
    same names. Raises as `make`."""
    try:
        certificate = x509.load_pem_x509_certificate((folder / CA).read_bytes())
        key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), None)
        names = _names(hosts) if hosts else _names_of(folder / CERT)
    except (OSError, ValueError, TypeError, x509.ExtensionNotFound) as error:
        raise UsageError(
            f"no CA in {folder}: {getattr(error, 'strerror', None) or error}",
            do=f"autoglm tls init {folder} --host …",
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise UsageError(f"{folder / CA_KEY} is not the key of {folder / CA}")
    with _writing(folder):
        _issue(folder, names, certificate, key, _lasts(days, clock))


def describe(path: Path) -> list[str]:
    """Lines for a person about the certificates in a PEM file. Raises UsageError."""
    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or 'no certificate in it'}") from error
    lines = []
    for each in certificates:
        lines.append(
            f"{path}: {each.subject.rfc4514_string() or 'no name'}, of {each.issuer.rfc4514_string()}"
        )
        lines.append(
            f"  holds from {each.not_valid_before_utc:%Y-%m-%d %H:%M} to {each.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        )
        with contextlib.suppress(x509.ExtensionNotFound):
            names = each.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            lines.append(f"  made out to {', '.join(str(name.value) for name in names)}")
    return lines


def _issue(
    folder: Path,
    names: x509.SubjectAlternativeName,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    lasts: tuple[datetime.datetime, datetime.datetime],
) -> None:
    """Whoever reads the two files between their renames finds that they do not fit, and looks again."""
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(lasts[1], authority.not_valid_after_utc)
    identity = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "autoglm node")])
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(name, authority.subject, key, (lasts[0], until))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(names, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identity), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    for file, data, mode in (
        (KEY, _pem(key), 0o600),
        (CERT, certificate.public_bytes(serialization.Encoding.PEM), 0o644),
    ):
        fresh = folder / f"{file}.new"
        fresh.unlink(missing_ok=True)
        _write(fresh, data, mode)
        fresh.replace(folder / file)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    lasts: tuple[datetime.datetime, datetime.datetime],
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(lasts[0])
        .not_valid_after(lasts[1])
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _lasts(days: int, clock: Clock | None) -> tuple[datetime.datetime, datetime.datetime]:
    if not 0 < days <= DAYS_MAX:
        raise UsageError(f"--days {days}", valid=f"1 to {DAYS_MAX}")
    now = datetime.datetime.fromtimestamp((clock or SystemClock()).wall(), datetime.UTC)
    return now - _EARLIER, now + datetime.timedelta(days=days)


def _names(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    if len(hosts) > HOSTS_MAX:
        raise UsageError(f"{len(hosts)} hosts", valid=f"at most {HOSTS_MAX}")
    return x509.SubjectAlternativeName([_name(host) for host in dict.fromkeys((*hosts, *LOCAL))])


def _name(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    valid = "a name or an address, as in tcp://HOST:PORT, without the port"
    if not 0 < len(host) <= 253 or not all(label for label in host.split(".")) or set(host) & set(" /:@,"):
        raise UsageError(f"--host {host!r}", valid=valid)
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise UsageError(f"--host {host!r}: {error}", valid=valid) from error


def _names_of(path: Path) -> x509.SubjectAlternativeName:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PlatformError(f"{folder} cannot be written to: {error.strerror or error}") from error
