"""Damaged and hostile run directories: one clear error that names the file, nothing executed, nothing huge
allocated."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.packs import parse_head, read_head
from autoglm_elastic.core.lineage import GenerationRecord
from autoglm_elastic.errors import CorruptSnapshot, ElasticError, UsageError
from autoglm_elastic.snapshot import CheckpointManager
from autoglm_elastic.storage import LocalBlobs

WAIT_S = 60.0
STATE = {"a": torch.arange(6.0).view(2, 3), "b": {"half": torch.ones(5, dtype=torch.float16), "n": 7}}


def target() -> dict[str, Any]:
    return {"a": torch.zeros(2, 3), "b": {"half": torch.zeros(5, dtype=torch.float16), "n": 0}}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two snapshots, of steps 1 and 2; every test works on a copy."""
    where = tmp_path_factory.mktemp("sound") / "run"
    with CheckpointManager(where) as manager:
        manager.put_generation(GenerationRecord(0, -1, -1, None, "fresh"))
        for step in (1, 2):
            state = {**STATE, "a": STATE["a"] + step}
            assert manager.save(step, state).wait(WAIT_S).committed
    return where


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run", symlinks=True))


def newest_files(run: Path) -> dict[str, Path]:
    with CheckpointManager(run) as manager:
        entry = manager.entries()[-1]
    manifest = run / "manifests" / f"{entry.manifest}.json"
    sha256 = json.loads(manifest.read_bytes())["packs"][0]["sha256"]
    return {
        "entry": run / "catalog" / f"{entry.name}.json",
        "manifest": manifest,
        "pack": run / "packs" / sha256[:2] / f"{sha256}.safetensors",
        "generation": run / "generations" / "0.json",
    }


@pytest.mark.parametrize("which", ["entry", "manifest", pytest.param("pack", marks=pytest.mark.long)])
def test_a_flip_of_any_byte_is_found_and_recovery_falls_back(run: Path, which: str) -> None:
    path = newest_files(run)[which]
    sound = path.read_bytes()
    seen: list[dict[str, Any]] = []
    with CheckpointManager(run, on_event=lambda name, fields: seen.append(fields)) as manager:
        second = manager.entries()[-1]
        for at in range(len(sound)):
            seen.clear()
            path.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << at % 8]) + sound[at + 1 :])
            chosen = manager.newest_verified()
            assert chosen is not None
            assert chosen.step == 1, f"byte {at} of {path.name}"
            assert [fields["entry"] for fields in seen] == [second.name]
            assert path.name in seen[0]["reason"]
            if which != "entry":
                assert manager.verify(second) != []
            if which == "manifest":
                with pytest.raises(CorruptSnapshot):
                    manager.load(target(), entry=second)


def test_a_flip_in_a_generation_record_is_found(run: Path) -> None:
    path = newest_files(run)["generation"]
    sound = path.read_bytes()
    with CheckpointManager(run) as manager:
        for at in range(len(sound)):
            path.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << at % 8]) + sound[at + 1 :])
            with pytest.raises(CorruptSnapshot, match=r"generations/0\.json"):
                manager.newest()


def test_verify_names_the_tensor_and_load_refuses_it(run: Path) -> None:
    path = newest_files(run)["pack"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)
    with CheckpointManager(run) as manager:
        entry = manager.entries()[-1]
        (problem,) = manager.verify(entry)
        assert (problem.tensor, problem.file) == ("b.half", f"packs/{path.parent.name}/{path.name}")
        with pytest.raises(CorruptSnapshot, match=f"{path.name}: tensor b.half"):
            manager.load(target(), entry=entry)


@pytest.mark.parametrize("which", ["entry", "manifest", "pack"])
@pytest.mark.parametrize("keep", [0, 7, -1])
def test_a_truncated_or_grown_file_is_found(run: Path, which: str, keep: int) -> None:
    path = newest_files(run)[which]
    sound = path.read_bytes()
    with CheckpointManager(run) as manager:
        entry = manager.entries()[-1]
        for damaged in (sound[:keep], sound + b"\0"):
            path.write_bytes(damaged)
            chosen = manager.newest_verified()
            assert chosen is not None
            assert chosen.step == 1
            with pytest.raises(CorruptSnapshot, match=path.name.removesuffix(".json")):
                manager.load(target(), entry=entry.name if which == "entry" else entry)


@pytest.mark.parametrize("which", ["manifest", "pack"])
def test_a_missing_file_or_a_link_is_found(run: Path, which: str) -> None:
    path = newest_files(run)[which]
    moved = path.rename(run / "elsewhere")
    with CheckpointManager(run) as manager:
        entry = manager.entries()[-1]
        assert "missing" in str(manager.verify(entry)[0])
        with pytest.raises(CorruptSnapshot, match="missing"):
            manager.load(target(), entry=entry)
        path.symlink_to(moved)
        assert "symbolic link" in str(manager.verify(entry)[0])
        with pytest.raises(CorruptSnapshot, match="symbolic link"):
            manager.load(target(), entry=entry)


def test_a_manifest_of_another_snapshot_is_refused(run: Path) -> None:
    with CheckpointManager(run) as manager:
        first, second = manager.entries()
        mixed = fmt.sealed(
            msgspec.structs.replace(second, manifest=first.manifest, manifest_bytes=first.manifest_bytes)
        )
        with pytest.raises(CorruptSnapshot, match="is of step 1"):
            manager.load(target(), entry=mixed)


def test_a_planted_pickle_is_never_looked_at(run: Path, tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (tmp_path / "exploded",)

    bomb = pickle.dumps(Bomb())
    for path in newest_files(run).values():
        path.write_bytes(bomb)
    (run / "catalog" / "000000000009-g0.json").write_bytes(bomb)
    (run / ".metadata").write_bytes(bomb)
    with CheckpointManager(run) as manager:
        for entry in manager.entries():
            manager.verify(entry)
        with pytest.raises(ElasticError):
            manager.load({})
    assert not (tmp_path / "exploded").exists()


Change = Callable[[dict[str, Any]], None]


def change(*path: str | int, to: Any) -> Change:
    def apply(document: dict[str, Any]) -> None:
        at: Any = document
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to

    return apply


HOSTILE: dict[str, Change] = {
    "unknown field": change("extra", to=1),
    "no dtype": change("tensors", "a", "dtype", to="object"),
    "huge shape": change("tensors", "a", "shape", to=[1 << 50, 1 << 50]),
    "shape beyond 64 bits": change("tensors", "a", "shape", to=[1 << 70, 1]),
    "negative extent": change("tensors", "a", "shape", to=[-2, -3]),
    "too many dimensions": change("tensors", "a", "shape", to=[1] * 1000),
    "shape as text": change("tensors", "a", "shape", to="23"),
    "larger than its packs": change("tensors", "a", "shape", to=[1 << 20, 3]),
    "no packs": change("packs", to=[]),
    "head before the data": change("packs", 0, "head", to=0),
    "head behind the file": change("packs", 0, "head", to=1 << 40),
    "a huge rank": change("packs", 0, "rank", to=1 << 62),
    "traversal in a pack's name": change("packs", 0, "sha256", to="../" * 20 + "etc/passwd"),
    "negative pack size": change("packs", 0, "nbytes", to=-1),
    "tree names no tensor": change("tree", "a", to={"$": "tensor", "v": "nobody"}),
    "tree with an unknown tag": change("tree", "a", to={"$": "object", "v": "os.system"}),
    "tree with more than a tag": change("tree", "a", to={"$": "tensor", "v": "a", "x": 1}),
    "tree with a broken int": change("tree", "a", to={"$": "int", "v": "__import__"}),
    "tree with a long int": change("tree", "a", to={"$": "int", "v": "9" * 5000}),
    "tree with bad base64": change("tree", "a", to={"$": "bytes", "v": "!"}),
    "tree with a duplicate key": change("tree", "a", to={"$": "dict", "v": [[1, 2], [1, 3]]}),
    "tree with an unhashable key": change("tree", "a", to={"$": "dict", "v": [[[1], 2]]}),
    "newer format": change("version", to=99),
    "other format": change("format", to="torch"),
    "other step": change("step", to=9),
}


def plant(run: Path, data: bytes) -> fmt.CatalogEntry:
    """A manifest with those bytes, its digest in order, and an entry that names it."""
    with CheckpointManager(run) as manager:
        entry = manager.entries()[-1]
    sha256 = hashlib.sha256(data).hexdigest()
    (run / "manifests" / f"{sha256}.json").write_bytes(data)
    return fmt.sealed(msgspec.structs.replace(entry, manifest=sha256, manifest_bytes=len(data)))


def canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_one_clear_error(run: Path, name: str) -> None:
    document = json.loads(newest_files(run)["manifest"].read_bytes())
    HOSTILE[name](document)
    entry = plant(run, canonical(document))
    with CheckpointManager(run) as manager:
        with pytest.raises((CorruptSnapshot, UsageError), match=entry.manifest):
            manager.load({}, entry=entry)
        (problem,) = manager.verify(entry)
        assert entry.manifest in problem.file


def test_a_manifest_that_is_not_canonical_is_refused(run: Path) -> None:
    sound = newest_files(run)["manifest"].read_bytes()
    for data in (
        b" " + sound,
        sound.replace(b'"format":', b'"format":"x","format":'),
        sound[:-1],
        b"\xff",
        b"",
        b"[",
    ):
        entry = plant(run, data) if data else None
        if entry is not None:
            with CheckpointManager(run) as manager, pytest.raises(CorruptSnapshot, match=entry.manifest):
                manager.load({}, entry=entry)


def test_a_deeply_nested_manifest_is_refused(run: Path) -> None:
    sound = newest_files(run)["manifest"].read_bytes()
    for depth in (200, 100_000):
        deep = b'"tree":' + b"[" * depth + b"]" * depth + b',"version"'
        entry = plant(run, sound[: sound.index(b'"tree":')] + deep + sound[sound.index(b'"version"') + 9 :])
        with CheckpointManager(run) as manager, pytest.raises(CorruptSnapshot, match=entry.manifest):
            manager.load({}, entry=entry)


def test_a_manifest_beyond_the_cap_is_not_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = newest_files(run)["entry"]
    entry = msgspec.json.decode(path.read_bytes(), type=fmt.CatalogEntry)
    monkeypatch.setattr(limits, "MANIFEST_BYTES_MAX", 100)
    with CheckpointManager(run) as manager, pytest.raises(CorruptSnapshot, match="at most 100"):
        manager.load({}, entry=entry)


META = "__metadata__"
HOSTILE_ROWS: dict[str, Change] = {
    "of no tensor": lambda header: header.update({"nobody": header.pop("a")}),
    "outside of its tensor": lambda header: header.update({"a@1,0": header.pop("a")}),
    "with a negative place": lambda header: header.update({"a@-1,0": header.pop("a")}),
    "with a place of other dimensions": lambda header: header.update({"a@0": header.pop("a")}),
    "of another dtype": change("a", "dtype", to="I32"),
    "of another shape": change("a", "shape", to=[3, 2]),
    "with an unknown field": change("a", "extra", to=1),
    "without digests": change(META, "digests", to=""),
    "with a digest of the wrong form": change(META, "digests", to="../" * 64),
    "of a newer pack": change(META, "autoglm", to="pack 99"),
    "without metadata": lambda header: header.pop(META),
}


@pytest.mark.parametrize("name", HOSTILE_ROWS)
def test_a_hostile_pack_with_its_digests_in_order_is_one_clear_error(run: Path, name: str) -> None:
    files = newest_files(run)
    data = files["pack"].read_bytes()
    nbytes = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:nbytes])
    HOSTILE_ROWS[name](header)
    if name.startswith(("o", "with a ")):
        header = {META: header[META], **dict(sorted(header.items(), key=lambda item: _begin(item[1])))}
    text = json.dumps(header, separators=(",", ":")).encode()
    head = struct.pack("<Q", nbytes - 8) + text.ljust(nbytes - 8)
    sha256 = hashlib.sha256(head).hexdigest()
    pack = run / "packs" / sha256[:2] / f"{sha256}.safetensors"
    pack.parent.mkdir(exist_ok=True)
    pack.write_bytes(head + data[nbytes:])
    manifest = json.loads(files["manifest"].read_bytes())
    manifest["packs"][0]["sha256"] = sha256
    entry = plant(run, canonical(manifest))
    with CheckpointManager(run) as manager:
        with pytest.raises(CorruptSnapshot, match=sha256):
            manager.load(target(), entry=entry)
        assert sha256 in manager.verify(entry)[0].file


def _begin(row: dict[str, Any]) -> int:
    return row.get("data_offsets", [-1])[0]


def pack_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def row(begin: Any = 0, end: Any = 4, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS: dict[str, bytes] = {
    "empty": b"",
    "short": b"1234",
    "huge length": pack_bytes({}, length=1 << 62),
    "length beyond the file": pack_bytes({}, length=64),
    "no JSON": pack_bytes(b"\x80\x04K\x01."),
    "a list": pack_bytes([]),
    "duplicate key": pack_bytes(b'{"a":1,"a":2}'),
    "deep": pack_bytes(b"[" * 100_000 + b"]" * 100_000),
    "overlap": pack_bytes({"a": row(), "b": row(2, 6)}, bytes(6)),
    "hole": pack_bytes({"a": row(), "b": row(8, 12)}, bytes(12)),
    "data behind the end": pack_bytes({"a": row()}, bytes(8)),
    "data missing": pack_bytes({"a": row()}, bytes(2)),
    "span of another size": pack_bytes({"a": row(shape=(2,))}, bytes(4)),
    "unknown dtype": pack_bytes({"a": row(dtype="OBJ")}, bytes(4)),
    "huge shape": pack_bytes({"a": row(shape=(1 << 62, 1 << 62))}, bytes(4)),
    "negative": pack_bytes({"a": row(-4, 0)}, bytes(4)),
    "a float": pack_bytes({"a": row(0, 4.0)}, bytes(4)),
    "a bool": pack_bytes({"a": row(False, 4)}, bytes(4)),
    "fields missing": pack_bytes({"a": {"dtype": "F32"}}, bytes(4)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_one_clear_error(tmp_path: Path, name: str) -> None:
    blobs = LocalBlobs(tmp_path)
    blobs.put_if_absent("pack", HEADERS[name])
    reader = blobs.open("pack")
    try:
        with pytest.raises(CorruptSnapshot, match=r"^the pack"):
            parse_head(read_head(reader, "the pack"), reader.nbytes, "the pack")
    finally:
        reader.close()


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_decode(data: bytes) -> None:
    for parse in (
        lambda: fmt.parse_entry(data, "000000000001-g0", "the file"),
        lambda: fmt.parse_generation(data, 0, "the file"),
        lambda: fmt.decode(data, fmt.Manifest, "the file"),
        lambda: fmt.decode(data, fmt.Prepared, "the file"),
    ):
        with pytest.raises(CorruptSnapshot, match=r"^the file"):
            parse()


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[fmt.Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    boxes: list[fmt.Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5))):
        number = draw(st.integers(0, len(boxes) - 1))
        offsets, sizes = boxes[number]
        dim = draw(st.integers(0, len(shape) - 1))
        if sizes[dim] < 2:
            continue
        cut = draw(st.integers(1, sizes[dim] - 1))
        boxes[number : number + 1] = [
            (offsets, (*sizes[:dim], cut, *sizes[dim + 1 :])),
            (
                (*offsets[:dim], offsets[dim] + cut, *offsets[dim + 1 :]),
                (*sizes[:dim], sizes[dim] - cut, *sizes[dim + 1 :]),
            ),
        ]
    return shape, boxes


@settings(max_examples=200)
@given(grids(), st.data())
def test_cover_is_exact(grid: tuple[tuple[int, ...], list[fmt.Box]], data: st.DataObject) -> None:
    shape, boxes = grid
    assert fmt.cover_problem(shape, boxes) == ""
    number = data.draw(st.integers(0, len(boxes) - 1))
    assert fmt.cover_problem(shape, [*boxes[:number], *boxes[number + 1 :]]) != ""
    assert fmt.cover_problem(shape, [*boxes, boxes[number]]) != ""
    same_size = [other for other in boxes if other[1] == boxes[number][1] and other != boxes[number]]
    if same_size:
        assert (
            fmt.cover_problem(shape, [same_size[0] if box == boxes[number] else box for box in boxes]) != ""
        )
