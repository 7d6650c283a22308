"""Bytes that others wrote, or damaged: one clear error that names the file, and no more memory than they are worth."""

from __future__ import annotations

import json
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_elastic.convert.dcp_metadata import _OPCODES, parse_metadata
from autoglm_elastic.convert.foreign import open_source
from autoglm_elastic.errors import CorruptSnapshot, ElasticError, UsageError
from tests.fuzz.targets import TARGETS, WHERE, Target, canonical, check, resealed

MEMORY_BYTES_MAX = 16 << 20
"""For what a few hundred hostile bytes may cost."""

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 1 << 31, 1 << 60, 1 << 63, 1 << 64, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["../" * 4, "/etc/passwd", "$", "0" * 64, "9" * 5000, "\0", "F32", "float32"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(document, dict | list):
        for key, inner in document.items() if isinstance(document, dict) else enumerate(document):
            found += places(inner, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid document with a few things changed: its values where it is JSON, else (or then) its bytes."""
    data = valid
    begin = data.find(b"{") if data[:1] not in (b"[", b"{") else 0
    if draw(st.booleans()) and begin >= 0:
        try:
            document = json.loads(data[begin:])
        except ValueError:
            document = None
        for _ in range(draw(st.integers(1, 3)) if isinstance(document, dict | list) else 0):
            path = draw(st.sampled_from(places(document)))
            if not path:
                continue
            at = document
            for key in path[:-1]:
                at = at[key]
            match draw(st.integers(0, 2)):
                case 0:
                    at[path[-1]] = draw(values)
                case 1:
                    del at[path[-1]]
                case _ if isinstance(at, dict):
                    at[draw(st.text(max_size=4))] = draw(values)
        if document is not None:
            order = draw(st.booleans()) or begin == 0
            text = canonical(document) if order else json.dumps(document, separators=(",", ":")).encode()
            data = (
                text
                if begin == 0
                else struct.pack("<Q", len(text) + -len(text) % 8) + text + b" " * (-len(text) % 8)
            )
            if draw(st.booleans()):
                data = resealed(data) or data
            return data
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        piece = draw(st.binary(max_size=4))
        data = data[:at] + piece + data[at + draw(st.integers(0, 4)) :]
    return data


def test_what_is_valid_is_taken() -> None:
    for name, target in TARGETS.items():
        assert check(target, target.valid), name


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=200)
@given(data=st.data())
def test_any_bytes_and_any_change_are_one_clear_error(name: str, data: st.DataObject) -> None:
    target: Target = TARGETS[name]
    check(target, data.draw(st.one_of(st.binary(max_size=200), mutated(target.valid))))


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in ("frames", "layout", "metadata")])
def test_a_flip_of_any_byte_of_a_sealed_document_is_found(name: str) -> None:
    target = TARGETS[name]
    sealed = resealed(target.valid) is not None and name not in ("details",)
    taken = 0
    for at in range(len(target.valid)):
        changed = bytearray(target.valid)
        changed[at] ^= 1 << at % 8
        taken += check(target, bytes(changed))
    assert taken == 0 or not sealed


def test_a_tensor_as_a_key_names_the_file() -> None:
    target = TARGETS["manifest"]
    document = json.loads(target.valid)
    document["tree"] = {"$": "dict", "v": [[{"$": "tensor", "v": "t0"}, 1]]}
    with pytest.raises(CorruptSnapshot, match=f"^{WHERE}: its structure is malformed"):
        target.parse(canonical(document))


HOSTILE = {
    "a header of exabytes": ("header", struct.pack("<Q", 1 << 62) + b"{}"),
    "a header of the cap": ("header", struct.pack("<Q", 64 << 20) + b"{}"),
    "a frame of gigabytes": ("frames", struct.pack("<IQ", 0xFFFFFFFF, 1 << 40)),
    "a frame that never comes": ("frames", struct.pack("<IQ", 1 << 10, 200 << 20)),
    "an integer of digits": ("entry", b'{"step":' + b"9" * 200_000 + b"}"),
    "a million brackets": ("manifest", b"[" * 1_000_000),
    "a place far off in the memo": ("metadata", b"\x80\x04Nr\xff\xff\xff\x7f."),
    "bytes of a terabyte": ("metadata", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."),
    "text of a terabyte": ("metadata", b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"."),
    "a bytearray of gigabytes": ("metadata", b"\x80\x05\x96" + struct.pack("<Q", 1 << 32) + b"."),
    "a frame of the pickle": ("metadata", b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"N."),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_sizes_cost_no_memory(name: str) -> None:
    which, data = HOSTILE[name]
    tracemalloc.start()
    try:
        taken = check(TARGETS[which], data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken == (name == "a frame that never comes")
    assert peak < MEMORY_BYTES_MAX


@pytest.mark.parametrize(
    "opcode", [op for op in pickletools.opcodes if op.name not in _OPCODES], ids=lambda op: op.name
)
def test_other_opcodes_of_pickle_are_refused(opcode: Any) -> None:
    with pytest.raises((UsageError, CorruptSnapshot), match=f"^{WHERE}"):
        parse_metadata(b"\x80\x04" + opcode.code.encode("latin1") + b"0\n" + b"\0" * 8 + b".", WHERE)


FOREIGN = [
    "builtins.eval",
    "os.system",
    "builtins.getattr",
    "copyreg._reconstructor",
    "torch.load",
    "torch.Tensor",
]


@pytest.mark.parametrize("call", ["(X\x02\x00\x00\x0011tR.", "(X\x02\x00\x00\x0011t\x81.", "}b.", "."])
@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("how", ["GLOBAL", "STACK_GLOBAL"])
def test_a_foreign_name_is_refused_however_it_is_used(name: str, call: str, how: str) -> None:
    module, _, attribute = name.rpartition(".")
    if how == "GLOBAL":
        wanted = f"c{module}\n{attribute}\n".encode()
    else:
        wanted = (
            b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, attribute)) + b"\x93"
        )
    with pytest.raises(UsageError, match=f"^{WHERE} is not opened: it wants {name}"):
        parse_metadata(b"\x80\x04" + wanted + call.encode("latin1"), WHERE)


OURS = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"


@given(
    st.lists(
        st.sampled_from(
            [b"R", b"\x81", b"b", b")", b"}", b"]", b"N", b"(", b"t", b"\x85", b"u", b"s", b"a", OURS]
        ),
        max_size=12,
    )
)
def test_any_combination_on_our_names_stays_among_records(opcodes: list[bytes]) -> None:
    check(TARGETS["metadata"], b"\x80\x04" + OURS + b"".join(opcodes) + b".")


@settings(max_examples=100)
@given(
    fields=st.dictionaries(st.sampled_from(["state_dict_metadata", "planner_data", "storage_data"]), values)
)
def test_metadata_of_another_form_are_one_error(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
) -> None:
    folder: Path = tmp_path_factory.mktemp("dcp", numbered=True)
    state = pickle.dumps(fields, protocol=4)[2:-1]
    (folder / ".metadata").write_bytes(b"\x80\x04" + OURS + b")\x81" + state + b"b.")
    reason = ""
    try:
        open_source(folder)
    except ElasticError as error:
        reason = str(error)
    assert "\n" not in reason
