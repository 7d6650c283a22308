"""A blob on its way into a bucket.

Up to one part it waits in memory and goes up under its own name. A larger one goes up in parts as an object under
`tmp/`, and comes to its name by a copy within the store: a name that is the content's digest is known only at the
end, and S3 wants an upload's name at its beginning. Memory is bounded by UPLOADS_MAX parts in flight, the one
being filled, and the first if its head is to come last. What a killed writer leaves is under `tmp/` or an
unfinished upload, which nobody sees (`S3Blobs.sweep`)."""

from __future__ import annotations

import contextlib
import secrets
import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Final

from autoglm_elastic.errors import PlatformError, UsageError
from autoglm_elastic.storage import _s3_client as client
from autoglm_elastic.storage._parallel import LIMIT_S, collect
from autoglm_elastic.storage.local import TEMPORARY_DIR

if TYPE_CHECKING:
    from autoglm_elastic.storage.s3 import S3Blobs

PART_BYTES: Final = 8 << 20
UPLOADS_MAX: Final = 4
"""Parts of one blob in flight; as many are held in memory."""
PARTS_MAX: Final = 10_000
"""S3's limit."""
COPY_PARTS_MAX: Final = 64
COPY_BYTES_MIN: Final = 128 << 20
"""A blob up to this size is copied by one request, a larger one by several at once (one may copy 5 GiB at most)."""


class S3Pending:
    """ports.PendingBlob. One thread at a time."""

    def __init__(self, blobs: S3Blobs, head: int) -> None:
        self._blobs = blobs
        self._name = f"{TEMPORARY_DIR}/{secrets.token_hex(16)}"
        self._head = head
        self._part = bytearray(head)
        self._limit = max(blobs.part_bytes, head)
        self._first = bytearray()
        self._number = 1
        self._upload = ""
        self._parts: dict[int, Future[dict[str, Any]]] = {}
        self._room = threading.BoundedSemaphore(UPLOADS_MAX)
        self._nbytes = head
        self._whole = False
        self._ended = False

    def write(self, view: memoryview | bytes) -> None:
        data = memoryview(view).cast("B")
        if self._ended:
            raise PlatformError("a blob is written to after it was published or discarded")
        try:
            at = 0
            while at < data.nbytes:
                if len(self._part) == self._limit:
                    self._end_part()
                taken = data[at : at + self._limit - len(self._part)]
                self._part += taken
                at += taken.nbytes
                self._nbytes += taken.nbytes
        except BaseException:
            self.discard()
            raise

    def _end_part(self) -> None:
        """The part being filled is full, or the last: send it, or keep it if its head is to come."""
        part, self._part = self._part, bytearray()
        number, self._number = self._number, self._number + 1
        self._limit = self._blobs.part_bytes
        if number == 1 and self._head:
            self._first = part
        else:
            self._send_part(number, part)

    def _send_part(self, number: int, body: bytearray) -> None:
        if number > PARTS_MAX:
            raise PlatformError(
                f"a blob of more than {PARTS_MAX} parts of {self._blobs.part_bytes} bytes",
                do="set snapshot.pack_bytes_max lower",
            )
        if not self._upload:
            answer = self._ask("create_multipart_upload", **self._blobs.at(self._name))
            self._upload = str(answer["UploadId"])
        if not self._room.acquire(timeout=LIMIT_S):
            raise PlatformError(f"an upload did not end within {LIMIT_S:.0f} s", do="check the network")
        for part in self._parts.values():
            if part.done():
                part.result(timeout=0)
        self._parts[number] = self._blobs.threads.submit(self._put_part, number, body)

    def _put_part(self, number: int, body: bytearray) -> dict[str, Any]:
        try:
            answer = self._ask(
                "upload_part",
                **self._blobs.at(self._name),
                UploadId=self._upload,
                PartNumber=number,
                Body=body,
            )
        finally:
            self._room.release()
        return _part_of(answer, number)

    def _tidy(self, request: str, **arguments: Any) -> None:
        """A request that is made once and may fail: what it leaves is swept."""
        with contextlib.suppress(*client.errors()):
            getattr(self._blobs.clients.once, request)(**arguments)

    def _ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """A request that may be repeated. Raises PlatformError."""
        try:
            answer: dict[str, Any] = getattr(self._blobs.clients.patient, request)(**arguments)
        except client.errors() as error:
            raise client.platform_error(error, "uploading", f"{self._blobs.url}/{self._name}") from error
        return answer

    def publish(self, name: str, head: bytes = b"") -> None:
        target = self._blobs.at(name)
        if len(head) != self._head:
            raise UsageError(f"a head of {len(head)} bytes", valid=f"{self._head}, as announced")
        if self._ended:
            raise PlatformError(f"{name} is published after the blob was published or discarded")
        try:
            if self._number == 1:
                self._part[: len(head)] = head
                self._ask("put_object", **target, Body=self._part)
                return
            self._end_part()
            if self._head:
                self._first[: len(head)] = head
                self._send_part(1, self._first)
            ordered = [self._parts[number] for number in sorted(self._parts)]
            parts = collect(ordered, f"uploading {self._blobs.url}/{name}")
            self._complete(self._blobs.at(self._name), self._upload, parts)
            self._whole, self._upload = True, ""
            self._copy(target)
        finally:
            self.discard()

    def _complete(self, at: dict[str, str], upload: str, parts: list[dict[str, Any]]) -> None:
        """A repeated request whose first try succeeded finds no such upload: the object tells then."""
        try:
            self._blobs.clients.patient.complete_multipart_upload(
                **at, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except client.errors() as error:
            if client.code_of(error) == "NoSuchUpload":
                there = self._ask("head_object", **at)
                if int(there["ContentLength"]) == self._nbytes:
                    return
            raise client.platform_error(error, "completing", f"{self._blobs.url}/{self._name}") from error

    def _copy(self, target: dict[str, str]) -> None:
        source = self._blobs.at(self._name)
        step = max(COPY_BYTES_MIN, -(-self._nbytes // COPY_PARTS_MAX))
        if self._nbytes <= step:
            self._ask("copy_object", **target, CopySource=source)
            return
        upload = str(self._ask("create_multipart_upload", **target)["UploadId"])

        def copy(number: int, begin: int) -> dict[str, Any]:
            answer = self._ask(
                "upload_part_copy",
                **target,
                UploadId=upload,
                PartNumber=number,
                CopySource=source,
                CopySourceRange=f"bytes={begin}-{min(begin + step, self._nbytes) - 1}",
            )
            return _part_of(answer["CopyPartResult"], number)

        pieces = enumerate(range(0, self._nbytes, step), 1)
        futures = [self._blobs.threads.submit(copy, number, begin) for number, begin in pieces]
        try:
            self._complete(target, upload, collect(futures, f"copying {self._blobs.url}/{self._name}"))
        except BaseException:
            self._tidy("abort_multipart_upload", **target, UploadId=upload)
            raise

    def discard(self) -> None:
        self._ended = True
        self._part, self._first = bytearray(), bytearray()
        for part in self._parts.values():
            part.cancel()
        wait(self._parts.values(), timeout=LIMIT_S)
        if self._upload:
            upload, self._upload = self._upload, ""
            self._tidy("abort_multipart_upload", **self._blobs.at(self._name), UploadId=upload)
        if self._whole:
            self._whole = False
            self._tidy("delete_object", **self._blobs.at(self._name))


def _part_of(answer: dict[str, Any], number: int) -> dict[str, Any]:
    """A part as its completion wants it, with whatever checksum the server gave."""
    checks = {
        key: value for key, value in answer.items() if key.startswith("Checksum") and key != "ChecksumType"
    }
    return {"ETag": answer["ETag"], "PartNumber": number, **checks}
