"""The data types a snapshot can hold: torch's names, and how their bytes are declared in a pack.

What the safetensors format has no name for (in the oldest version we accept) is stored as the type named
here, with one more dimension for the two halves of a complex number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class DType:
    """`name`: as in `torch.<name>`, in manifests. `stored`: in a pack's header. `parts`: stored values per
    element."""

    name: str
    stored: str
    nbytes: int
    parts: int = 1


def _table() -> dict[str, DType]:
    rows = (
        ("float64", "F64", 8, 1),
        ("float32", "F32", 4, 1),
        ("float16", "F16", 2, 1),
        ("bfloat16", "BF16", 2, 1),
        ("float8_e4m3fn", "F8_E4M3", 1, 1),
        ("float8_e5m2", "F8_E5M2", 1, 1),
        ("float8_e4m3fnuz", "U8", 1, 1),
        ("float8_e5m2fnuz", "U8", 1, 1),
        ("float8_e8m0fnu", "U8", 1, 1),
        ("float4_e2m1fn_x2", "U8", 1, 1),
        ("int64", "I64", 8, 1),
        ("int32", "I32", 4, 1),
        ("int16", "I16", 2, 1),
        ("int8", "I8", 1, 1),
        ("uint64", "U64", 8, 1),
        ("uint32", "U32", 4, 1),
        ("uint16", "U16", 2, 1),
        ("uint8", "U8", 1, 1),
        ("bool", "BOOL", 1, 1),
        ("complex128", "F64", 16, 2),
        ("complex64", "F32", 8, 2),
        ("complex32", "F16", 4, 2),
    )
    return {row[0]: DType(*row) for row in rows}


BY_NAME: Final = _table()
