"""Nested state as JSON plus a list of tensors, with a closed set of types: what is moved, stored and rolled
back.

`encode` and `decode` are inverse to each other for None, bool, int, float, str, bytes-free lists, tuples,
dicts with scalar keys, Counters and tensors. Nothing else is accepted, and nothing is ever pickled.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from autoglm_elastic.training.outcomes import StateMismatch

Spec = list[Any]
"""[dtype, shape, strides, device type] of a tensor, as JSON."""

_TENSOR, _TUPLE, _ITEMS, _COUNTER, _FLOAT = "__tensor__", "__tuple__", "__items__", "__counter__", "__float__"


def encode(value: Any, tensors: list[Tensor], where: str) -> Any:
    """JSON for `value`; its tensors are appended to `tensors`. `where` names the value in errors."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(float(value))}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {_TENSOR: len(tensors) - 1}
    if isinstance(value, list):
        return [encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, dict):
        items = [[_key(key, where), encode(item, tensors, f"{where}.{key}")] for key, item in value.items()]
        if isinstance(value, Counter):
            return {_COUNTER: items}
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return dict(items)
        return {_ITEMS: items}
    raise StateMismatch(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be tracked",
        valid="None, bool, int, float, str, list, tuple, dict, torch.Tensor",
        do="give its owner a state_dict() and load_state_dict() made of these",
    )


def _key(key: Any, where: str) -> Any:
    if key is None or isinstance(key, (bool, int, float, str)):
        return key
    raise StateMismatch(
        f"{where} has a key of type {type(key).__qualname__}", valid="str, int, float, bool, None"
    )


def decode(value: Any, tensors: list[Tensor]) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        kind, inner = next(iter(value.items()))
        if kind == _TENSOR:
            return tensors[inner]
        if kind == _FLOAT:
            return float(inner)
        if kind == _TUPLE:
            return tuple(decode(item, tensors) for item in inner)
        if kind in (_ITEMS, _COUNTER):
            items = {key: decode(item, tensors) for key, item in inner}
            return Counter(items) if kind == _COUNTER else items
    return {key: decode(item, tensors) for key, item in value.items()}


def spec(tensor: Tensor) -> Spec:
    """How to make a tensor like this one. For a DTensor the global shape."""
    return [
        str(tensor.dtype).removeprefix("torch."),
        list(tensor.shape),
        list(tensor.stride()),
        tensor.device.type,
    ]


def dtype_of(made: Spec) -> torch.dtype:
    dtype = getattr(torch, str(made[0]), None)
    if not isinstance(dtype, torch.dtype):
        raise StateMismatch(f"a tensor of unknown dtype {made[0]!r}")
    return dtype


def empty(made: Spec, device: torch.device | None = None) -> Tensor:
    """A tensor after its spec, not initialised. On `device` unless the spec says CPU."""
    where = torch.device("cpu") if made[3] == "cpu" or device is None else device
    return torch.empty_strided(made[1], made[2], dtype=dtype_of(made), device=where)


def is_dense(tensor: Tensor) -> bool:
    """Its elements fill one stretch of memory exactly once, in some order of dimensions."""
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
