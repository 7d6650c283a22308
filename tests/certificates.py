"""Certificates of a test's own: good ones, and those that a stranger would come with."""

from __future__ import annotations

import time
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from autoglm_elastic.coordination import Credentials, TlsFiles, authority


def files_in(folder: Path, server_name: str = "") -> TlsFiles:
    return TlsFiles(
        *(str(folder / name) for name in (authority.CA, authority.CERT, authority.KEY)), server_name
    )


def flags_for(files: TlsFiles) -> tuple[str, ...]:
    """`autoglm-run --set …` for them."""
    return (f"--set=tls.ca={files.ca}", f"--set=tls.cert={files.cert}", f"--set=tls.key={files.key}")


def made(folder: Path, *hosts: str) -> Credentials:
    """Of a new CA in `folder`."""
    authority.make(folder, hosts, days=2)
    return Credentials(files_in(folder))


class At:
    """A clock that stands still, so many days from now."""

    def __init__(self, days: float) -> None:
        self._wall = time.time() + days * 86400

    def monotonic(self) -> float:
        return 0.0

    def wall(self) -> float:
        return self._wall


def foreign(folder: Path, *hosts: str) -> TlsFiles:
    """Files of another CA, as another tool writes them."""
    folder.mkdir()
    files = files_in(folder)
    ca = trustme.CA()
    issued = ca.issue_cert(*(hosts or ("127.0.0.1", "localhost")))
    ca.cert_pem.write_to_path(files.ca)
    issued.private_key_pem.write_to_path(files.key)
    Path(files.cert).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    Path(files.key).chmod(0o600)
    return files


def for_clients_only(folder: Path) -> None:
    """Replaces the certificate in `folder` by one of the same CA, and for the same key, that no server may show."""
    before = x509.load_pem_x509_certificate((folder / authority.CERT).read_bytes())
    key = serialization.load_pem_private_key((folder / authority.CA_KEY).read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    builder = (
        x509.CertificateBuilder()
        .subject_name(before.subject)
        .issuer_name(before.issuer)
        .public_key(before.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(before.not_valid_before_utc)
        .not_valid_after(before.not_valid_after_utc)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    )
    issued = builder.sign(key, hashes.SHA256())
    (folder / authority.CERT).write_bytes(issued.public_bytes(serialization.Encoding.PEM))
