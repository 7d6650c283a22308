"""torch.load where nothing can be executed: the only place that calls it, always with `weights_only`."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch

from autoglm_elastic.errors import UsageError


def torch_loaded(source: Path | io.BytesIO, where: str) -> Any:
    """What torch.save wrote; tensors on the CPU, a file's mapped. Raises UsageError for anything but tensors and plain
    values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(
                source, map_location="cpu", weights_only=True, mmap=isinstance(source, Path) or None
            )
    except Exception as error:
        raise UsageError(
            f"{where} is not opened: {' '.join(str(error).split())[:200]}",
            valid="a file of torch.save with tensors and plain values (weights_only)",
        ) from error
