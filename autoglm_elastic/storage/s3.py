"""Blobs in an S3 bucket.

Put-if-absent is a conditional PUT (`If-None-Match: *`). Every such object carries a token of its writer, so that
a request whose answer was lost is settled by looking whose object is there. A server that ignores the condition
is refused before anything is written. Large blobs go up in parts under `tmp/` and come to their name by a copy
within the store, since their name is known only when they are whole (`_s3_upload`).

This room knows nothing of snapshots. An `S3Blobs` belongs to the process that made it (no fork)."""

from __future__ import annotations

import functools
import secrets
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final

from autoglm_elastic.errors import CorruptSnapshot, ElasticError, PlatformError
from autoglm_elastic.ports import Outcome
from autoglm_elastic.storage import _s3_client as client
from autoglm_elastic.storage._names import blob_names, checked_name
from autoglm_elastic.storage._parallel import Threads
from autoglm_elastic.storage._remote import RemoteReader
from autoglm_elastic.storage._s3_client import Fate
from autoglm_elastic.storage._s3_upload import PART_BYTES, S3Pending
from autoglm_elastic.storage.local import TEMPORARY_DIR

PUT_ATTEMPTS: Final = 3
"""Tries of a conditional PUT as long as nothing is there; each is followed by a look at what is."""
RESUMES_MAX: Final = 5
"""How often a range whose connection broke in the middle is continued."""
_BLOCK_BYTES: Final = 1 << 20
_TOKEN: Final = "autoglm-put"  # noqa: S105 - the name of a header

_conditional: set[tuple[str, str]] = set()
"""(endpoint, bucket) that honour conditional writes, as found by this process."""
_probing = threading.Lock()


class S3Blobs:
    """ports.StreamBlobs under `s3://bucket/prefix`.

    Args:
        prefix: "" or "some/folder", without slashes at its ends.
        options: `_s3_client.OPTIONS`; what is not given is found as AWS tools do.
        part_bytes: of a multipart upload; at least 5 MiB on most servers.
    """

    remote = True

    def __init__(
        self, bucket: str, prefix: str, options: Mapping[str, str], *, part_bytes: int = PART_BYTES
    ) -> None:
        self.bucket, self.base = bucket, f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.part_bytes = part_bytes
        self._options = client.checked(options)
        self.threads = Threads()

    @functools.cached_property
    def clients(self) -> client.Clients:
        """Made at the first request: most ranks of a generation make none. Raises UsageError."""
        return client.connect(self._options)

    @functools.cached_property
    def _errors(self) -> tuple[type[Exception], ...]:
        return client.errors()

    @functools.cached_property
    def _broken(self) -> tuple[type[Exception], ...]:
        return (*self._errors, OSError)

    def at(self, name: str) -> dict[str, str]:
        """Bucket and key of a blob, as the arguments of a request."""
        checked_name(name)
        return {"Bucket": self.bucket, "Key": self.base + name}

    def failed(self, error: Exception, doing: str, name: str) -> Exception:
        """What to raise for a request that failed."""
        if client.is_missing(error):
            return FileNotFoundError(f"{self.url}/{name}")
        return client.platform_error(error, doing, f"{self.url}/{name}")

    # Reading.

    def _head(self, name: str) -> dict[str, Any]:
        try:
            head: dict[str, Any] = self.clients.patient.head_object(**self.at(name))
        except self._errors as error:
            raise self.failed(error, "looking at", name) from error
        return head

    def size(self, name: str) -> int:
        return int(self._head(name)["ContentLength"])

    def open(self, name: str) -> RemoteReader:
        return RemoteReader(self, name)

    def read(self, name: str, *, bytes_max: int) -> bytes:
        try:
            answer = self.clients.patient.get_object(**self.at(name))
        except self._errors as error:
            raise self.failed(error, "reading", name) from error
        with answer["Body"] as body:
            nbytes = int(answer["ContentLength"])
            if nbytes > bytes_max:
                raise CorruptSnapshot(f"{self.url}/{name} has {nbytes} bytes", valid=f"at most {bytes_max}")
            data = bytearray(nbytes)
            done = self._fill(body, memoryview(data))
        if done < nbytes:
            self.fetch(name, done, memoryview(data)[done:])
        return bytes(data)

    def read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        return self.open(name).read(offset, nbytes)

    def fetch(self, name: str, offset: int, view: memoryview) -> None:
        """One range request, continued where a connection breaks. Raises FileNotFoundError, CorruptSnapshot
        when the object ends before `view` is full, PlatformError."""
        done = 0
        for _ in range(RESUMES_MAX + 1):
            if done == view.nbytes:
                return
            wanted = f"bytes={offset + done}-{offset + view.nbytes - 1}"
            try:
                answer = self.clients.patient.get_object(**self.at(name), Range=wanted)
            except self._errors as error:
                if client.status_of(error) == 416:
                    raise CorruptSnapshot(f"{self.url}/{name} became shorter while it was read") from error
                raise self.failed(error, "reading", name) from error
            with answer["Body"] as body:
                if int(answer["ContentLength"]) > view.nbytes - done:
                    raise PlatformError(f"{self.url}/{name}: the server ignores ranges")
                if int(answer["ContentLength"]) < view.nbytes - done:
                    raise CorruptSnapshot(f"{self.url}/{name} became shorter while it was read")
                done += self._fill(body, view[done:])
        if done < view.nbytes:
            raise PlatformError(
                f"reading {self.url}/{name}: the connection broke {RESUMES_MAX + 1} times",
                do="check the network",
            )

    def _fill(self, body: Any, view: memoryview) -> int:
        """Bytes that arrived before `view` was full or the connection broke."""
        done = 0
        try:
            while done < view.nbytes:
                block = body.read(min(_BLOCK_BYTES, view.nbytes - done))
                if not block:
                    break
                view[done : done + len(block)] = block
                done += len(block)
        except self._broken:
            return done
        return done

    def list(self, prefix: str) -> list[str]:
        checked_name(prefix)
        return blob_names(item["Key"].removeprefix(self.base) for item in self._objects(f"{prefix}/"))

    def _objects(self, prefix: str) -> Iterator[dict[str, Any]]:
        pages = self.clients.patient.get_paginator("list_objects_v2")
        try:
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.base + prefix):
                yield from page.get("Contents", ())
        except self._errors as error:
            raise client.platform_error(error, "listing", f"{self.url}/{prefix}") from error

    # Writing.

    def check_writable(self) -> None:
        """Raises PlatformError when the store cannot be written, or ignores the condition of a put-if-absent.
        Asked once per process and bucket."""
        where = (str(self.clients.once.meta.endpoint_url), self.bucket)
        with _probing:
            if where not in _conditional:
                self._probe()
                _conditional.add(where)

    def _probe(self) -> None:
        name = f"{TEMPORARY_DIR}/probe-{secrets.token_hex(8)}"
        try:
            outcomes = [self._put_if_absent(name, word) for word in (b"first", b"second")]
        finally:
            self._forget(name)
        if Outcome.UNKNOWN in outcomes:
            raise PlatformError(
                f"{self.url}: no answer to a trial write", do="check the network and try again"
            )
        if outcomes != [Outcome.OK, Outcome.CONFLICT]:
            raise PlatformError(
                f"{self.url}: this server ignores conditional writes, so two writers could both believe to have won",
                valid="an object store that honours If-None-Match on PUT (docs/storage.md)",
            )

    def _forget(self, name: str) -> None:
        try:
            self.delete(name)
        except ElasticError:
            return

    def put_if_absent(self, name: str, data: bytes) -> Outcome:
        """OK, CONFLICT, or UNKNOWN when a request left and neither its answer nor a look at the object tells
        what became of it. Raises PlatformError when nothing was written."""
        self.check_writable()
        return self._put_if_absent(name, data)

    def _put_if_absent(self, name: str, data: bytes) -> Outcome:
        token = secrets.token_hex(16)
        doubtful = False
        for _ in range(PUT_ATTEMPTS):
            try:
                self.clients.once.put_object(
                    **self.at(name), Body=data, IfNoneMatch="*", Metadata={_TOKEN: token}
                )
                return Outcome.OK
            except self._errors as error:
                fate = client.fate_of(error)
                if fate is Fate.NOTHING:
                    if doubtful:
                        return Outcome.UNKNOWN
                    raise client.platform_error(error, "creating", f"{self.url}/{name}") from error
                doubtful = doubtful or fate is Fate.UNKNOWN
            there = self._look(name, token)
            if there is not None:
                return there
        return Outcome.UNKNOWN

    def _look(self, name: str, token: str) -> Outcome | None:
        """OK: what is there was written with `token`. CONFLICT: by another. UNKNOWN: not readable. None: nothing
        is there."""
        try:
            metadata = self._head(name).get("Metadata", {})
        except FileNotFoundError:
            return None
        except ElasticError:
            return Outcome.UNKNOWN
        return Outcome.OK if metadata.get(_TOKEN) == token else Outcome.CONFLICT

    def replace(self, name: str, data: bytes) -> None:
        self.check_writable()
        try:
            self.clients.patient.put_object(**self.at(name), Body=data)
        except self._errors as error:
            raise client.platform_error(error, "replacing", f"{self.url}/{name}") from error

    def create(self, *, head: int = 0) -> S3Pending:
        self.check_writable()
        return S3Pending(self, head)

    def point(self, name: str, target: str) -> None:
        """Nothing: an object store has no links."""
        checked_name(name)

    def delete(self, name: str) -> None:
        try:
            self.clients.patient.delete_object(**self.at(name))
        except self._errors as error:
            if not client.is_missing(error):
                raise client.platform_error(error, "removing", f"{self.url}/{name}") from error

    def now(self) -> float:
        """The server's clock, in whole seconds as it tells them."""
        return self._server_time().timestamp()

    def ages(self, prefix: str) -> dict[str, float]:
        """By the server's clock, as of the end of the list."""
        checked_name(prefix)
        written = {
            item["Key"].removeprefix(self.base): item["LastModified"] for item in self._objects(f"{prefix}/")
        }
        now = self._server_time()
        return {name: (now - written[name]).total_seconds() for name in blob_names(written)}

    def stamps(self, prefix: str) -> dict[str, str]:
        checked_name(prefix)
        found = {
            item["Key"].removeprefix(self.base): f"{item['ETag']} {item['LastModified'].timestamp()}"
            for item in self._objects(f"{prefix}/")
        }
        return {name: found[name] for name in blob_names(found)}

    def delete_older(self, name: str, older_s: float) -> int:
        """Removes what was looked at: that version where the bucket keeps versions; else on the condition that its ETag
        is the same, where the server knows this condition. Then the same bytes, written again between the look and
        the removal, may go (ports.AgingBlobs)."""
        try:
            head = self._head(name)
        except FileNotFoundError:
            return -1
        if self._age(name, head) < older_s:
            return -1
        version = head.get("VersionId")
        exactly = {"IfMatch": head["ETag"]} if version in (None, "null") else {"VersionId": version}
        try:
            self._remove(name, exactly)
        except self._errors as error:
            if client.is_missing(error) or client.status_of(error) in (409, 412):
                return -1
            raise client.platform_error(error, "removing", f"{self.url}/{name}") from error
        return int(head["ContentLength"])

    def _age(self, name: str, head: Mapping[str, Any]) -> float:
        """Seconds since the object that was looked at was written, by the server's clock."""
        checked_name(name)
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - head["LastModified"]).total_seconds())

    def _remove(self, name: str, exactly: Mapping[str, str]) -> None:
        try:
            self.clients.patient.delete_object(**self.at(name), **exactly)
        except self._errors as error:
            if client.status_of(error) != 501:
                raise
            self.clients.patient.delete_object(**self.at(name))

    def sweep(self, older_s: float) -> int:
        """Removes what interrupted writers left longer than `older_s` ago by the server's clock: unfinished
        multipart uploads and objects under `tmp/`. Returns how many. Raises PlatformError."""
        swept = 0
        try:
            limit = self._server_time() - timedelta(seconds=older_s)
            uploads = self.clients.patient.get_paginator("list_multipart_uploads")
            for page in uploads.paginate(Bucket=self.bucket, Prefix=self.base):
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"] < limit:
                        self.clients.patient.abort_multipart_upload(
                            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                        swept += 1
            for item in self._objects(f"{TEMPORARY_DIR}/"):
                if item["LastModified"] < limit:
                    self.clients.patient.delete_object(Bucket=self.bucket, Key=item["Key"])
                    swept += 1
        except self._errors as error:
            raise client.platform_error(error, "sweeping", self.url) from error
        return swept

    def _server_time(self) -> datetime:
        try:
            answer = self.clients.patient.list_objects_v2(Bucket=self.bucket, Prefix=self.base, MaxKeys=1)
        except self._errors as error:
            raise client.platform_error(error, "listing", self.url) from error
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
