"""`.metadata` of torch.distributed.checkpoint, which is a pickle, read without executing anything of it.

The unpickler knows exactly the names that torch writes there, and each stands for a record of this module, made for one
file: no class, function or module of torch (or of anybody) can be reached from the file. Any other name is refused."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, Final, Self

from autoglm_elastic.catalog import limits
from autoglm_elastic.errors import CorruptSnapshot, PlatformError, UsageError, in_one_line

METADATA_NAME: Final = ".metadata"
_METADATA: Final = "torch.distributed.checkpoint.metadata"
_RECORDS: Final = frozenset(
    {
        (_METADATA, "Metadata"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib._local", "PosixPath"),
        ("collections", "OrderedDict"),
    }
)

_OPCODES: Final = frozenset(
    """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE
    BINUNICODE SHORT_BINBYTES BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND
    APPENDS EMPTY_DICT SETITEM SETITEMS MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL
    STACK_GLOBAL REDUCE NEWOBJ BUILD
    """.split()  # noqa: SIM905 - a table
)
"""What a pickler writes for such records, of protocol 2 or above. The others reach for more (EXT1, PERSID, INST), or
let a few bytes demand any amount of memory (BYTEARRAY8)."""


class Record:
    """An object of the file. `args`: what it was made with; `fields`: what was put into it."""

    args: tuple[Any, ...]
    fields: dict[str, Any]

    def __new__(cls, *args: Any) -> Self:
        made = super().__new__(cls)  # a pickle may leave __init__ out
        made.args, made.fields = args, {}
        return made

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.fields = state
        else:
            self.args = state if isinstance(state, tuple) else (state,)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.fields[key] = value

    def __hash__(self) -> int:
        return id(self)

    def field(self, name: str) -> Any:
        """Raises CorruptSnapshot when it is not there."""
        if name not in self.fields:
            raise CorruptSnapshot(f"{METADATA_NAME}: {type(self).__name__} has no {name}")
        return self.fields[name]


class DType(Record):
    """A type of torch, by its name."""

    name = ""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._classes: dict[tuple[str, str], type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self._classes:
            if key in _RECORDS:
                self._classes[key] = type(name, (Record,), {})
            elif module == "torch" and name.isidentifier() and name in _torch_dtypes():
                self._classes[key] = type(name, (DType,), {"name": name})
            else:
                raise pickle.UnpicklingError(f"it wants {module[:60]}.{name[:60]}")
        return self._classes[key]


def _torch_dtypes() -> frozenset[str]:
    import torch

    return frozenset(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))


def read_metadata(folder: Path) -> Record:
    """The Metadata record. Raises CorruptSnapshot for a damaged file, UsageError for one that wants anything else."""
    path = folder / METADATA_NAME
    try:
        with path.open("rb") as file:
            data = file.read(limits.MANIFEST_BYTES_MAX + 1)
    except OSError as error:
        raise PlatformError(f"reading {path}: {error.strerror}") from error
    if len(data) > limits.MANIFEST_BYTES_MAX:
        raise CorruptSnapshot(f"{path} is too large", valid=f"at most {limits.MANIFEST_BYTES_MAX} bytes")
    return parse_metadata(data, str(path))


def parse_metadata(data: bytes, path: str) -> Record:
    """As `read_metadata`; `path` is for errors."""
    try:
        _check_opcodes(data)
        found = _Unpickler(data).load()
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} is not opened: {in_one_line(error)[:160]}",
            valid="what torch.distributed.checkpoint writes there",
        ) from error
    except Exception as error:
        raise CorruptSnapshot(f"{path} does not decode: {type(error).__name__}") from error
    if type(found).__name__ != "Metadata" or not isinstance(found, Record):
        raise CorruptSnapshot(f"{path} holds no Metadata")
    return found


def _check_opcodes(data: bytes) -> None:
    """Only what is expected, and no place in the memo that so few bytes cannot fill: the unpickler would make room for
    it. Raises UnpicklingError, ValueError."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"it has the opcode {opcode.name}")
        if opcode.name.endswith("BINPUT") and argument is not None and argument > len(data):
            raise ValueError(f"place {argument} of the memo")
