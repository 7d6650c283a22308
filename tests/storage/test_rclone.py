"""`rclone serve s3` answers every conditional write with success: it must be refused."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import CREDENTIALS

from autoglm_elastic.errors import PlatformError
from autoglm_elastic.storage import open_blobs

RCLONE = shutil.which("rclone")
WAIT_S = 60.0


def _serves_s3() -> bool:
    if RCLONE is None:
        return False
    told = subprocess.run([RCLONE, "serve", "s3", "--help"], capture_output=True, text=True, timeout=WAIT_S)
    return "--auth-key" in told.stdout


pytestmark = pytest.mark.skipif(not _serves_s3(), reason="no rclone that can serve s3 (1.65 or newer)")


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    assert RCLONE is not None
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    key = f"{CREDENTIALS['AWS_ACCESS_KEY_ID']},{CREDENTIALS['AWS_SECRET_ACCESS_KEY']}"
    process = subprocess.Popen(
        [
            RCLONE,
            "--config",
            "",
            "serve",
            "s3",
            "--addr",
            address,
            "--auth-key",
            key,
            str(tmp_path / "buckets"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "Starting s3 server" in line or "Serving" in line:
                break
        yield f"http://{address}"
    finally:
        process.kill()
        process.communicate(timeout=WAIT_S)


def test_it_is_refused(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PlatformError, match="ignores conditional writes"):
        open_blobs("s3://bucket/run", for_writing=True)
    assert [path for path in (tmp_path / "buckets").rglob("*") if path.is_file()] == []
