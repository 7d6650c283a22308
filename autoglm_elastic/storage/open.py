"""From a path or URL to the blobs under it.

May touch: nothing until the blobs are used, except what a client of the protocol reads of its configuration.
What a protocol needs is imported when its URL is given."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final, Protocol
from urllib.parse import unquote, urlsplit

from autoglm_elastic.errors import UsageError
from autoglm_elastic.ports import StreamBlobs
from autoglm_elastic.storage.local import LocalBlobs

PREFIX_BYTES_MAX: Final = 512
"""S3's keys have 1,024 bytes; a blob's own name at most 255."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


_S3: Final = ("s3", "s3a")


class _CanBeAsked(Protocol):
    def check_writable(self) -> None: ...


def is_url(text: str) -> bool:
    """Whether `text` names something by protocol instead of by path."""
    return _URL.match(text) is not None


def modules_of(url: str) -> tuple[str, ...]:
    """What using blobs there will import: for a process that prepares others by importing it once."""
    return ("boto3", "botocore.httpsession") if url.lower().partition("://")[0] in _S3 else ()


def open_blobs(
    place: str | os.PathLike[str], *, options: Mapping[str, str] | None = None, for_writing: bool = False
) -> StreamBlobs:
    """The blobs under a directory (a path or file://), in an S3 bucket (s3://bucket/prefix), in this process'
    memory (memory://name) or, to be read only, wherever else fsspec reaches.

    Args:
        options: of the protocol: for s3:// `endpoint_url`, `region_name`, `profile_name`, `addressing_style`; for
            others those of their fsspec file system. Credentials are found as the protocol's other tools do.
        for_writing: find out now whether the place can be written with the promises of `ports.StreamBlobs`,
            instead of at the first write.

    Raises:
        UsageError: a malformed URL, an unknown option, a package that is missing.
        PlatformError: for_writing, and the place cannot be written or has no put-if-absent.
    """
    text = os.fspath(place)
    given = dict(options or {})
    if not is_url(text):
        return _local(text, given)
    if not text.isprintable():
        raise UsageError(f"URL {text[:200]!r}", valid="no control characters")
    parts = urlsplit(text)
    protocol = parts.scheme.lower()
    if parts.username or parts.password:
        raise UsageError(
            f"{protocol}:// with credentials in it", do="give them as the protocol's other tools expect them"
        )
    if protocol in ("file", "local"):
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise UsageError(f"{text}", valid="file:///an/absolute/path")
        return _local(unquote(parts.path), given)
    if parts.query or parts.fragment:
        raise UsageError(f"{text} has a query", valid="protocol://place/prefix")
    blobs: StreamBlobs
    asked: _CanBeAsked
    if protocol in _S3:
        from autoglm_elastic.storage.s3 import S3Blobs

        blobs = asked = S3Blobs(_bucket(parts.netloc, text), _prefix(parts.path, text), given)
    else:
        from autoglm_elastic.storage.fsspec_blobs import FsspecBlobs

        rest = text[len(protocol) + len("://") :].rstrip("/")
        blobs = asked = FsspecBlobs(protocol, f"{protocol}://{rest}", given)
    if for_writing:
        asked.check_writable()
    return blobs


def _local(path: str, options: Mapping[str, str]) -> LocalBlobs:
    if options:
        raise UsageError(f"option {min(options)!r} for a directory", valid="no options")
    return LocalBlobs(path)


def _bucket(name: str, url: str) -> str:
    if not _BUCKET.fullmatch(name):
        raise UsageError(url, valid="s3://bucket/prefix")
    return name


def _prefix(path: str, url: str) -> str:
    prefix = path.strip("/")
    parts = prefix.split("/") if prefix else []
    wrong = any(part in ("", ".", "..") for part in parts)
    if wrong or len(prefix.encode()) > PREFIX_BYTES_MAX:
        raise UsageError(
            url[:200], valid=f"a prefix without empty, '.' or '..' parts, of at most {PREFIX_BYTES_MAX} bytes"
        )
    return prefix
