"""torch's data types and the names that manifests give them; which torch wrote a snapshot."""

from __future__ import annotations

import platform
from typing import Final

import torch

from autoglm_elastic.catalog.dtypes import BY_NAME, DType
from autoglm_elastic.errors import UsageError

_TORCH: Final[dict[str, torch.dtype]] = {
    name: getattr(torch, name) for name in BY_NAME if hasattr(torch, name)
}
BY_TORCH: Final[dict[torch.dtype, DType]] = {_TORCH[name]: BY_NAME[name] for name in _TORCH}


def torch_dtype(name: str) -> torch.dtype:
    """Raises UsageError for a type that this torch does not have yet."""
    try:
        return _TORCH[name]
    except KeyError:
        raise UsageError(f"the snapshot holds {name}", do="load it with a newer torch") from None


def versions() -> dict[str, str]:
    """What a manifest says of the program that wrote it."""
    return {"python": platform.python_version(), "torch": str(torch.__version__)}
