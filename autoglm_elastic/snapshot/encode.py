"""From a live state to its structure as JSON (catalog/tree.py says which JSON): tensors and arrays get names,
objects are asked for `to_state()` or `state_dict()`, and what does not fit names itself."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.tree import INT64, Path, path_name
from autoglm_elastic.errors import UsageError


def to_plain(value: object) -> object:
    """The state that an object offers of itself, or the value unchanged."""
    for method in ("to_state", "state_dict"):
        offered = getattr(value, method, None)
        if callable(offered) and not isinstance(value, type):
            return offered()
    return value


def encode(value: object, path: Path, name_tensor: Callable[[Path, torch.Tensor], str]) -> Any:
    """JSON for `value`. `name_tensor` is called for every tensor and numpy array and gives the name to store.

    Raises UsageError for what does not fit, naming it.
    """
    if len(path) > limits.TREE_DEPTH_MAX:
        raise UsageError(f"state is nested deeper than {limits.TREE_DEPTH_MAX} at {path_name(path[:4])}…")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, torch.Tensor):
        return {"$": "tensor", "v": name_tensor(path, value)}
    if isinstance(value, np.ndarray):
        return {"$": "array", "v": name_tensor(path, _as_tensor(value, path))}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int):
        return int(value) if value in INT64 else {"$": "int", "v": str(int(value))}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$": "float", "v": repr(float(value))}
    if isinstance(value, str):
        return _text(str(value), path)
    if isinstance(value, bytes | bytearray):
        return {"$": "bytes", "v": _text(base64.b64encode(value).decode(), path)}
    if isinstance(value, Mapping):
        return _encode_mapping(value, path, name_tensor)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        items = [encode(item, (*path, index), name_tensor) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$": "tuple", "v": items}
    plain = to_plain(value)
    if plain is value:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise UsageError(
            f"state at {path_name(path) or 'the root'} is a {kind}",
            valid="tensors, numpy arrays, None, bool, int, float, str, bytes; dicts, lists, tuples of them",
            do="give it to_state() and from_state(state), or leave it out of the state",
        )
    return encode(plain, path, name_tensor)


def _encode_mapping(
    value: Mapping[Any, Any], path: Path, name_tensor: Callable[[Path, torch.Tensor], str]
) -> Any:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {str(key): encode(item, (*path, key), name_tensor) for key, item in value.items()}

    def no_tensor(where: Path, _: torch.Tensor) -> str:
        raise UsageError(f"a tensor is a dict key at {path_name(where)}")

    pairs = []
    for key, item in value.items():
        if not isinstance(key, str | int | float | bool | bytes | tuple | type(None)):
            raise UsageError(
                f"state at {path_name(path)} has a key of type {type(key).__qualname__}",
                valid="str, int, float, bool, bytes, None, or a tuple of them",
            )
        step = key if isinstance(key, str | int) else repr(key)
        pairs.append([encode(key, path, no_tensor), encode(item, (*path, step), name_tensor)])
    return {"$": "dict", "v": pairs}


def _text(text: str, path: Path) -> str:
    if len(text) > limits.TREE_TEXT_MAX:
        raise UsageError(
            f"state at {path_name(path)} has a value of {len(text)} characters",
            valid=f"at most {limits.TREE_TEXT_MAX}",
            do="keep it in a uint8 tensor",
        )
    return text


def _as_tensor(array: np.ndarray[Any, Any], path: Path) -> torch.Tensor:
    try:
        return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
    except TypeError as error:
        raise UsageError(
            f"state at {path_name(path)} is a numpy array of dtype {array.dtype}",
            valid="a dtype that torch has",
        ) from error
