"""From paths and URLs to blobs; what is refused, and in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from autoglm_elastic.errors import PlatformError, UsageError
from autoglm_elastic.storage import LocalBlobs, is_url, open_blobs


def test_paths_and_file_urls_are_directories(tmp_path: Path) -> None:
    for place in (
        tmp_path,
        str(tmp_path),
        f"file://{tmp_path}",
        f"file://localhost{tmp_path}",
        f"local://{tmp_path}",
    ):
        blobs = open_blobs(place, for_writing=True)
        assert isinstance(blobs, LocalBlobs)
        assert blobs.root == str(tmp_path)
    spaced = open_blobs("file:///a%20b")
    assert isinstance(spaced, LocalBlobs)
    assert spaced.root == "/a b"


@pytest.mark.parametrize("text", ["s3://b/p", "memory://x", "file:///x", "gs://b"])
def test_what_is_a_url(text: str) -> None:
    assert is_url(text)


@pytest.mark.parametrize("text", ["runs/a", "/runs/a", "a:b", "C:/runs", "./s3:/x", ""])
def test_what_is_a_path(text: str) -> None:
    assert not is_url(text)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file://host/runs", "file:///an/absolute/path"),
        ("file://relative", "file:///an/absolute/path"),
        ("s3://", "s3://bucket/prefix"),
        ("s3:///prefix", "s3://bucket/prefix"),
        ("s3://a b/prefix", "s3://bucket/prefix"),
        ("s3://bucket/a//b", "a prefix without empty"),
        ("s3://bucket/a/../b", "a prefix without empty"),
        ("s3://bucket/a\nb", "no control characters"),
        ("s3://bucket/" + "a" * 513, "at most 512 bytes"),
        ("s3://bucket/run?versionId=1", "has a query"),
        ("s3://key:secret@bucket/run", "credentials in it"),
        ("nonsense://there", "Protocol not known"),
    ],
)
def test_a_wrong_url_is_refused(url: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        open_blobs(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_has_no_options(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="option 'x'"):
        open_blobs(tmp_path, options={"x": "y"})


def test_other_file_systems_are_read_but_not_written(tmp_path: Path) -> None:
    """A zip archive stands for all of them: its put-if-absent would be a look and then a write."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "run.zip", "w") as archive:
        archive.writestr("catalog/1.json", "12345")
    blobs = open_blobs("zip://", options={"fo": str(tmp_path / "run.zip")})
    assert blobs.list("catalog") == ["catalog/1.json"]
    assert blobs.read("catalog/1.json", bytes_max=5) == b"12345"
    assert blobs.read_range("catalog/1.json", 1, 2) == b"23"
    for write in (blobs.create, lambda: blobs.put_if_absent("a", b""), lambda: blobs.replace("HEAD", b"")):
        with pytest.raises(PlatformError, match="can be read, but is not known to create"):
            write()
    with pytest.raises(PlatformError, match="can be read, but"):
        blobs.delete("catalog/1.json")
    with pytest.raises(PlatformError, match="can be read, but"):
        open_blobs("zip://", options={"fo": str(tmp_path / "run.zip")}, for_writing=True)


def test_without_boto3_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UsageError, match=r"pip install 'autoglm-elastic\[s3\]'") as caught:
        open_blobs("s3://bucket/run")
    assert "\n" not in str(caught.value)


def test_without_a_protocols_package_it_is_named() -> None:
    with pytest.raises(UsageError, match="needs a package that is not installed") as caught:
        open_blobs("abfs://container/run")
    assert "\n" not in str(caught.value)


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, autoglm_elastic.storage\n"
        "autoglm_elastic.storage.open_blobs('some/path')\n"
        "print(*[name for name in ('torch', 'fsspec', 'boto3', 'botocore') if name in sys.modules])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert told.stdout.split() == []
