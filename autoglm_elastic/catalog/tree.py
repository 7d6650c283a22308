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

from autoglm_elastic.catalog import limits
from autoglm_elastic.errors import CorruptSnapshot, UsageError, in_one_line

Path = tuple[str | int, ...]
"""Where in a state: keys and indices from the root; keys that are not strings by their text."""

INT64: Final = range(-(1 << 63), 1 << 63)
_CODES: Final = frozenset({"tensor", "array", "tuple", "dict", "float", "int", "bytes"})
_FLOATS: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def path_name(path: Path) -> str:
    """A path as people (and torch.distributed.checkpoint) write it."""
    return ".".join(map(str, path))


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
    except (ValueError, TypeError, KeyError, binascii.Error, CorruptSnapshot) as error:
        raise CorruptSnapshot(f"{where}: its structure is malformed: {in_one_line(error)[:160]}") from error


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
    if code == "int" and (len(value) > 1000 or str(int(value)) != value or int(value) in INT64):
        raise ValueError("an int of the wrong form")
    if code == "float" and value not in _FLOATS:
        raise ValueError("a float of the wrong form")
    if code == "bytes":
        base64.b64decode(value, validate=True)


def skeleton(node: Any) -> Any:
    """The structure without its values: what is no container and no tensor becomes null."""
    inside = node["v"] if code_of(node) in ("tuple", "dict") else node
    if code_of(node) in ("tensor", "array"):
        return node
    if code_of(node) == "dict":
        return {"$": "dict", "v": [[key, skeleton(item)] for key, item in inside]}
    if isinstance(inside, list):
        items = [skeleton(item) for item in inside]
        return {"$": "tuple", "v": items} if code_of(node) else items
    if isinstance(node, dict) and code_of(node) is None:
        return {key: skeleton(item) for key, item in node.items()}
    return None


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


def nest(nodes: Mapping[Path, Any]) -> Any:
    """Nested JSON from leaves by path, the inverse of `leaves`; whole numbers are places in lists, as torch's planner
    writes them. Raises UsageError for a leaf inside of another."""
    root: dict[Any, Any] = _Branch()
    for path, node in nodes.items():
        at = root
        for key in path[:-1]:
            at = at.setdefault(key, _Branch())
            if not isinstance(at, _Branch):
                raise UsageError(f"{path_name(path)} lies inside of a value")
        at[path[-1]] = node
    return _plain(root)


class _Branch(dict[Any, Any]):
    """Tells a level of the structure from a leaf's node, which can be a dict too."""


def _plain(node: Any) -> Any:
    if not isinstance(node, _Branch):
        return node
    if node and all(type(key) is int for key in node) and sorted(node) == list(range(len(node))):
        return [_plain(node[index]) for index in range(len(node))]
    if all(isinstance(key, str) and not key.startswith("$") for key in node):
        return {key: _plain(item) for key, item in node.items()}
    return {"$": "dict", "v": [[key, _plain(item)] for key, item in node.items()]}
