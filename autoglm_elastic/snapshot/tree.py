"""The structure of a state as JSON: a closed set of types, in which tensors are named and nothing is code.

JSON's own types stand for themselves. Everything else is an object with the one key "$" for its type and "v"
for its value: tensor (a name), array (a name; numpy), tuple, dict (pairs; for keys that are not strings or
begin with "$"), float (nan, inf, -inf), int (beyond 64 bits, as text), bytes (base64). Objects must offer
`to_state()` or `state_dict()`."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch

from autoglm_elastic.errors import CorruptSnapshot, UsageError
from autoglm_elastic.snapshot import limits

Path = tuple[str | int, ...]
"""Where in a state: keys and indices from the root; keys that are not strings by their text."""

_INT64: Final = range(-(1 << 63), 1 << 63)
_CODES: Final = frozenset({"tensor", "array", "tuple", "dict", "float", "int", "bytes"})
_FLOATS: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def path_name(path: Path) -> str:
    """A path as people (and torch.distributed.checkpoint) write it."""
    return ".".join(map(str, path))


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
        return int(value) if value in _INT64 else {"$": "int", "v": str(int(value))}
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


def decode(node: Any, tensor: Callable[[str], Any], array: Callable[[str], Any]) -> Any:
    """The value of a node; `tensor` and `array` give the values for names. Raises CorruptSnapshot."""
    if isinstance(node, list):
        return [decode(item, tensor, array) for item in node]
    if not isinstance(node, dict):
        return node
    code = code_of(node)
    if code is None:
        return {key: decode(item, tensor, array) for key, item in node.items()}
    value = node["v"]
    match code:
        case "tensor":
            return tensor(value)
        case "array":
            return array(value)
        case "tuple":
            return tuple(decode(item, tensor, array) for item in value)
        case "dict":
            return {decode(key, tensor, array): decode(item, tensor, array) for key, item in value}
        case "float":
            return _FLOATS[value]
        case "int":
            return int(value)
        case _:
            return base64.b64decode(value, validate=True)


def code_of(node: Any) -> str | None:
    """The "$" of a tagged node, or None for a plain one."""
    return node["$"] if isinstance(node, dict) and "$" in node else None


def children(node: Any) -> dict[Any, Any] | None:
    """The items of a container node by their key or index, or None for a leaf."""
    code = code_of(node)
    if isinstance(node, list) or code == "tuple":
        return dict(enumerate(node if isinstance(node, list) else node["v"]))
    if code == "dict":
        return {decode(key, _none, _none): item for key, item in node["v"]}
    return node if code is None and isinstance(node, dict) else None


def _none(name: str) -> None:
    raise CorruptSnapshot(f"a tensor ({name[:40]!r}) stands where a dict key should")


def check(tree: Any, names: Mapping[str, object], where: str) -> None:
    """A decoded tree is well-formed and names only tensors in `names`. Raises CorruptSnapshot."""
    try:
        _check(tree, names, 0)
    except (ValueError, TypeError, KeyError, binascii.Error) as error:
        raise CorruptSnapshot(f"{where}: its structure is malformed: {str(error)[:160]}") from error


def _check(node: Any, names: Mapping[str, object], depth: int) -> None:
    if depth > 2 * limits.TREE_DEPTH_MAX:
        raise ValueError("nested too deeply")
    if isinstance(node, list):
        for item in node:
            _check(item, names, depth + 1)
        return
    if not isinstance(node, dict):
        return
    if "$" not in node:
        if any(key.startswith("$") for key in node):
            raise ValueError("a plain key begins with $")
        for item in node.values():
            _check(item, names, depth + 1)
        return
    code, value = node["$"], node.get("v")
    if set(node) != {"$", "v"} or code not in _CODES:
        raise ValueError(f"unknown tag {str(code)[:40]!r}")
    if code in ("tuple", "dict"):
        if not isinstance(value, list) or (
            code == "dict" and not all(isinstance(pair, list) and len(pair) == 2 for pair in value)
        ):
            raise ValueError(f"a {code} without a list")
        for item in value:
            _check(item, names, depth + 1)
        if code == "dict" and len(children(node) or ()) != len(value):
            raise ValueError("a key appears twice")
        return
    if not isinstance(value, str):
        raise ValueError(f"a {code} without text")
    if code in ("tensor", "array") and value not in names:
        raise ValueError(f"no tensor {value[:80]!r}")
    if code == "int" and (len(value) > 1000 or str(int(value)) != value or int(value) in _INT64):
        raise ValueError("an int of the wrong form")
    if code == "float" and value not in _FLOATS:
        raise ValueError("a float of the wrong form")
    if code == "bytes":
        base64.b64decode(value, validate=True)


def merge(one: Any, other: Any) -> Any:
    """The structure of two ranks: dicts are united, `one` wins where they differ otherwise."""
    if isinstance(one, dict) and isinstance(other, dict) and code_of(one) is None and code_of(other) is None:
        united = dict(one)
        for key, item in other.items():
            united[key] = merge(united[key], item) if key in united else item
        return united
    if code_of(one) == "dict" and code_of(other) == "dict":
        keys = [pair[0] for pair in one["v"]]
        pairs = [list(pair) for pair in one["v"]]
        for key, item in other["v"]:
            if key in keys:
                pairs[keys.index(key)][1] = merge(pairs[keys.index(key)][1], item)
            else:
                pairs.append([key, item])
        return {"$": "dict", "v": pairs}
    return one


def leaves(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Leaves as torch.distributed.checkpoint sees them: dicts are always opened, lists and tuples if a tensor
    is inside."""
    inside = children(node)
    is_dict = isinstance(node, dict) and code_of(node) in (None, "dict")
    if inside is None or (path and not is_dict and not has_tensor(node)):
        yield path, node
        return
    for key, item in inside.items():
        yield from leaves(item, (*path, str(key) if is_dict else key))


def has_tensor(node: Any) -> bool:
    if code_of(node) in ("tensor", "array"):
        return True
    return any(has_tensor(item) for item in (children(node) or {}).values())
