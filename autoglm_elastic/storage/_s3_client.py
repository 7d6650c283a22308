"""The S3 client, and what its errors mean.

Two clients of one session: `patient` repeats what may be repeated (reads, whole-object writes of content names),
`once` sends a request a single time, for conditional writes: repeating those behind our back would make our own
write look like somebody else's. Credentials, region and endpoint are found as every AWS tool finds them."""

from __future__ import annotations

import enum
import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from autoglm_elastic.errors import PlatformError, UsageError

CONNECT_S: Final = 10.0
READ_S: Final = 60.0
"""Longest silence of the server within a request; a server-side copy of a large object may take a while."""
ATTEMPTS: Final = 5
"""Tries of a request that may be repeated, with botocore's exponential back-off of at most 20 s between two."""
CONNECTIONS: Final = 32

OPTIONS: Final = ("endpoint_url", "region_name", "profile_name", "addressing_style")
_ENDPOINT_VARIABLES: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


class Fate(enum.Enum):
    """What a failed request did to the object."""

    NOTHING = "nothing"
    """It never left, or was refused."""
    EXISTS = "exists"
    """The condition did not hold: the name is taken."""
    UNKNOWN = "unknown"
    """It left, and no answer says what became of it."""


@dataclass(frozen=True, slots=True)
class Clients:
    """`once` never repeats a request, `patient` does. Both are thread safe; neither survives a fork."""

    once: Any
    patient: Any


def checked(options: Mapping[str, str]) -> Mapping[str, str]:
    """Raises UsageError without boto3, or for an unknown option. Imports nothing."""
    if importlib.util.find_spec("boto3") is None:
        raise UsageError("s3:// needs boto3", do="pip install 'autoglm-elastic[s3]'")
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise UsageError(f"option {unknown[0]!r} for s3://", valid=", ".join(OPTIONS))
    return options


def connect(options: Mapping[str, str]) -> Clients:
    """Clients for this process and its AWS_ environment as it is now, shared by all who ask for the same: making
    one takes half a second, and a job opens its snapshots anew in every generation.

    Raises UsageError for an unknown profile or a malformed endpoint."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return _connect(os.getpid(), tuple(sorted(options.items())), tuple(sorted(environment.items())))


@functools.lru_cache(maxsize=8)
def _connect(
    _pid: int, given: tuple[tuple[str, str], ...], _environment: tuple[tuple[str, str], ...]
) -> Clients:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    options = dict(given)
    endpoint = options.get("endpoint_url")
    own_server = endpoint or any(os.environ.get(name) for name in _ENDPOINT_VARIABLES)
    style = options.get("addressing_style") or ("path" if own_server else "auto")
    try:
        session = boto3.session.Session(
            profile_name=options.get("profile_name"), region_name=options.get("region_name")
        )

        def client(attempts: int) -> Any:
            config = Config(
                connect_timeout=CONNECT_S,
                read_timeout=READ_S,
                max_pool_connections=CONNECTIONS,
                retries={"mode": "standard", "total_max_attempts": attempts},
                s3={"addressing_style": style},
            )
            return session.client(
                "s3",
                endpoint_url=endpoint,
                config=config,
                # Only the session's own default is missing a region; any S3 answers for this one.
                region_name=session.region_name or "us-east-1",
            )

        return Clients(client(1), client(ATTEMPTS))
    except (BotoCoreError, ValueError) as error:
        raise UsageError(f"s3://: {one_line(error)}") from error


def errors() -> tuple[type[Exception], ...]:
    """What a request can raise, for an `except`."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

    return (BotoCoreError, ClientError, HTTPClientError)


def status_of(error: Exception) -> int:
    """The HTTP status, 0 without an answer."""
    response = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or 0)


def code_of(error: Exception) -> str:
    """S3's word for it, or the name of the exception."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code") or type(error).__name__)


def is_missing(error: Exception) -> bool:
    """No such object. (A missing bucket is something else; HEAD cannot tell the two apart.)"""
    return status_of(error) == 404 and code_of(error) not in ("NoSuchBucket", "NoSuchUpload")


def fate_of(error: Exception) -> Fate:
    """What a single write that raised `error` may have done."""
    from botocore.exceptions import ClientError, HTTPClientError

    if isinstance(error, ClientError):
        status = status_of(error)
        if status == 412:
            return Fate.EXISTS
        again = status in (408, 409, 429) or status >= 500
        return Fate.UNKNOWN if again and status != 501 else Fate.NOTHING
    if isinstance(error, HTTPClientError) and type(error).__name__ not in (
        "EndpointConnectionError",
        "ConnectTimeoutError",
        "ProxyConnectionError",
    ):
        return Fate.UNKNOWN
    return Fate.NOTHING


def platform_error(error: Exception, doing: str, url: str) -> PlatformError:
    """A failed request as one line for a person, with advice."""
    status, code = status_of(error), code_of(error)
    if status in (401, 403) or "Credential" in code or "Token" in code:
        advice = "check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, role) and the bucket's policy"
    elif code == "NoSuchBucket":
        advice = "create the bucket, or correct its name"
    elif status in (301, 307, 400) and ("Redirect" in code or "Region" in code or "Malformed" in code):
        advice = "set AWS_REGION to the bucket's region"
    elif status in (429, 503):
        advice = "the object store asks for fewer requests: try again later"
    elif status >= 500:
        advice = "the object store is failing: try again later"
    elif status == 0:
        advice = "check the network and the endpoint (AWS_ENDPOINT_URL, AWS_REGION)"
    else:
        advice = ""
    return PlatformError(f"{doing} {url}: {one_line(error)}", do=advice)


def one_line(error: BaseException) -> str:
    """The error's text without line breaks, of a bounded length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
