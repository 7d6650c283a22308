"""The leaves of a state as JSON (catalog/tree.py says which JSON): plain values, and tensors by their names."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.tree import INT64, Path, path_name
from autoglm_elastic.errors import UsageError
from autoglm_elastic.snapshot import walk

NameTensor = Callable[[Path, torch.Tensor], str]
"""Called for every tensor and numpy array; gives the name to store."""


def encode(value: object, path: Path, name_tensor: NameTensor) -> Any:
    """JSON for `value`. Raises UsageError for what does not fit, naming it."""
    if isinstance(value, walk.LEAVES):
        return encode_leaf(value, path, name_tensor)
    shape, leaves = walk.learn(value, path)
    nodes = [encode_leaf(leaf, at, name_tensor) for leaf, at in zip(leaves, shape.paths, strict=True)]
    return shape.build(nodes, {}, encode_key)


def encode_leaf(leaf: Any, path: Path, name_tensor: NameTensor) -> Any:
    if isinstance(leaf, torch.Tensor):
        return {"$": "tensor", "v": name_tensor(path, leaf)}
    if isinstance(leaf, np.ndarray):
        return {"$": "array", "v": name_tensor(path, as_tensor(leaf, path))}
    return encode_value(leaf, path)


def encode_value(value: Any, path: Path) -> Any:
    """JSON for what is neither a tensor nor a container. Raises UsageError."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if value in INT64 else {"$": "int", "v": str(int(value))}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$": "float", "v": repr(float(value))}
    if isinstance(value, str):
        return _text(str(value), path)
    if isinstance(value, bytes | bytearray):
        return {"$": "bytes", "v": _text(base64.b64encode(value).decode(), path)}
    raise UsageError(
        f"state at {path_name(path)} is a {type(value).__module__}.{type(value).__qualname__}",
        valid="numbers, text and bytes",
        do="keep it as one of these",
    )


def encode_key(key: Any) -> Any:
    """JSON for a mapping's key that JSON itself does not have: a value, or a tuple of them."""
    return encode(key, (), _no_tensor)


def _no_tensor(path: Path, tensor: torch.Tensor) -> str:
    raise UsageError("a tensor is a dict key", do="use text or a number")


def _text(text: str, path: Path) -> str:
    if len(text) > limits.TREE_TEXT_MAX:
        raise UsageError(
            f"state at {path_name(path)} has a value of {len(text)} characters",
            valid=f"at most {limits.TREE_TEXT_MAX}",
            do="keep it in a uint8 tensor",
        )
    return text


def as_tensor(array: np.ndarray[Any, Any], path: Path) -> torch.Tensor:
    """A tensor of the array's elements. Raises UsageError for a dtype that torch does not have."""
    try:
        return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
    except TypeError as error:
        raise UsageError(
            f"state at {path_name(path)} is a numpy array of dtype {array.dtype}",
            valid="a dtype that torch has",
        ) from error
