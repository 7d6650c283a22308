"""A real S3 server for tests, and a proxy before it that loses, breaks or changes what passes through.

One moto server a session, a bucket of its own for each test."""

from __future__ import annotations

import contextlib
import http.client
import re
import select
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

START_S = 60.0
_SERVER = Path(__file__).parents[1] / "docker" / "objects.py"
_RUNNING = re.compile(rb"Running on (http://127\.0\.0\.1:\d+)")


@contextlib.contextmanager
def moto_server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(endpoint, process) of a moto server on a free port of the loopback interface."""
    process = subprocess.Popen(
        [sys.executable, "-u", str(_SERVER), "127.0.0.1", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        seen = b""
        while (found := _RUNNING.search(seen)) is None:
            assert select.select([process.stderr], [], [], START_S)[0], seen
            block = process.stderr.read1()
            assert block, seen
            seen += block
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield found.group(1).decode(), process
    finally:
        process.kill()
        process.wait(timeout=START_S)
        drain.join(timeout=START_S)
        assert process.stderr is not None
        process.stderr.close()


@dataclass
class Request:
    """What the proxy is about to forward."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Fault:
    """What becomes of a request that `when` chooses, the next `times` times.

    forward: it reaches the server.
    answer: a status of our own instead of the server's; 0: the connection is cut; None: the server's.
    cut_at: so many bytes of the server's body, then the connection is cut.
    strip: a header that is taken out on the way.
    """

    when: Callable[[Request], bool]
    times: int = 1
    forward: bool = True
    answer: int | None = None
    cut_at: int | None = None
    strip: str = ""
    seen: threading.Event = field(default_factory=threading.Event)


class Proxy:
    """Forwards to `target`; `requests` is what came in."""

    def __init__(self, target: str) -> None:
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        proxy, address = self, urlsplit(target).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = START_S

            def log_message(self, *_: object) -> None:
                return

            def _serve(self) -> None:
                proxy.serve(self, address)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(timeout=START_S)
        self._server.server_close()

    def _fault(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
        for fault in list(self.faults):
            if fault.times > 0 and fault.when(request):  # may hold the request, and only this one
                with self._lock:
                    if fault.times > 0:
                        fault.times -= 1
                        fault.seen.set()
                        return fault
        return None

    def serve(self, handler: BaseHTTPRequestHandler, address: str) -> None:
        headers = {key.lower(): value for key, value in handler.headers.items()}
        if headers.pop("expect", "") and handler.command in ("PUT", "POST"):
            pass  # http.server has answered 100 already
        body = handler.rfile.read(int(headers.get("content-length", 0)))
        request = Request(handler.command, handler.path, headers, body)
        fault = self._fault(request)
        if fault is not None and fault.strip:
            headers.pop(fault.strip, None)
        status, answered, data = 0, [], b""
        if fault is None or fault.forward:
            connection = http.client.HTTPConnection(address, timeout=START_S)
            try:
                connection.request(handler.command, handler.path, body, headers)
                response = connection.getresponse()
                status, answered, data = response.status, response.getheaders(), response.read()
            except OSError:
                fault = fault or Fault(lambda _: True, answer=0)
            finally:
                connection.close()
        if fault is not None and fault.answer is not None:
            if fault.answer == 0:
                self._cut(handler)
                return
            code = {503: "SlowDown", 403: "AccessDenied", 501: "NotImplemented"}.get(
                fault.answer, "InternalError"
            )
            status, answered = fault.answer, []
            data = f"<Error><Code>{code}</Code><Message>planted</Message></Error>".encode()
        handler.send_response(status)
        skipped = {"transfer-encoding", "connection", "server", "date"}
        has_length = False
        for key, value in answered:
            if key.lower() not in skipped:
                handler.send_header(key, value)
                has_length = has_length or key.lower() == "content-length"
        if not has_length:
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if fault is not None and fault.cut_at is not None:
            handler.wfile.write(data[: fault.cut_at])
            self._cut(handler)
            return
        handler.wfile.write(data)

    def _cut(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)


_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


def packs_read(requests: list[Request]) -> int:
    """Bytes of packs that were asked for."""
    ranges = [
        _RANGE.fullmatch(request.headers.get("range", ""))
        for request in requests
        if request.method == "GET" and "/packs/" in request.path
    ]
    return sum(int(found[2]) - int(found[1]) + 1 for found in ranges if found)


CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@dataclass
class Bucket:
    """A bucket of the session's server, and a client that goes to it directly."""

    name: str
    endpoint: str
    client: Any

    @property
    def url(self) -> str:
        return f"s3://{self.name}/run"

    def objects(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def uploads(self) -> list[str]:
        return [
            item["Key"] for item in self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", ())
        ]


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    with moto_server() as (endpoint, _):
        yield endpoint


@pytest.fixture(scope="session")
def clients() -> dict[str, Any]:
    """By endpoint: making one takes half a second."""
    return {}


@pytest.fixture
def make_bucket(clients: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Bucket]:
    """A new bucket on a server; the environment names the server and credentials for it."""
    import boto3

    def make(endpoint: str) -> Bucket:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        if endpoint not in clients:
            clients[endpoint] = boto3.session.Session().client("s3", endpoint_url=endpoint)
        client = clients[endpoint]
        name = f"test-{uuid.uuid4().hex[:16]}"
        client.create_bucket(Bucket=name)
        return Bucket(name, endpoint, client)

    return make


@pytest.fixture
def bucket(s3_endpoint: str, make_bucket: Callable[[str], Bucket]) -> Bucket:
    return make_bucket(s3_endpoint)


@pytest.fixture
def proxy(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Stands before the server of `bucket`; the environment names it as the endpoint."""
    with Proxy(bucket.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy
