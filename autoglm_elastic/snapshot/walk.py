"""The shape of a state: which containers it is made of, with which keys, and where its leaves stand.

A shape is learned once, with every check and every error; from then on following it costs little more than
looking at the leaves. It is followed only as long as every container has the type and the keys that were
learned; anything else gives None, and the state is learned anew.

Pure: it looks at a state, asks objects for `to_state()` or `state_dict()`, and changes nothing."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.tree import Path, path_name
from autoglm_elastic.errors import UsageError

LEAVES = (torch.Tensor, np.ndarray, np.generic, bool, int, float, str, bytes, bytearray, type(None))


@dataclass(frozen=True, slots=True)
class Node:
    """A container, or an object that offers a state (`offers`: the one child is what it offers).

    `keys`: of a mapping, None for a sequence. `key_words`: what else tells keys apart that are equal to each
    other (1, True and 1.0). `children`: None in the place of a leaf. `leaves`: of the whole subtree."""

    kind: type
    offers: bool
    keys: tuple[Any, ...] | None
    key_words: tuple[object, ...]
    children: tuple[Node | None, ...]
    flat: bool
    leaves: int


@dataclass(frozen=True, slots=True)
class Shape:
    """`paths` and `kinds` of the leaves, in the order in which `follow` gives them."""

    root: Node
    paths: tuple[Path, ...]
    kinds: list[type]

    def follow(self, state: object) -> list[Any] | None:
        """The leaves of `state`, or None when its shape is another one."""
        leaves: list[Any] = []
        if _follow(self.root, state, leaves) and list(map(type, leaves)) == self.kinds:
            return leaves
        return None

    def fixed(
        self, leaves: Sequence[Any], changing: frozenset[int], key: Callable[[Any], Any]
    ) -> dict[int, Any]:
        """JSON of the largest subtrees that hold none of the leaves `changing`, for `build`."""
        built: dict[int, Any] = {}
        _build_fixed(self.root, leaves, 0, sorted(changing), built, key)
        return built

    def build(self, leaves: Sequence[Any], built: dict[int, Any], key: Callable[[Any], Any]) -> Any:
        """The structure as JSON (catalog/tree.py says which).

        Args:
            leaves: the JSON of every leaf.
            built: JSON of subtrees by the `id` of their node, which is taken instead of being built.
            key: JSON of a mapping's key.
        """
        return _build(self.root, leaves, 0, built, key)


def learn(state: object, path: Path = ()) -> tuple[Shape, list[Any]]:
    """The shape of a state and its leaves. Raises UsageError for what no snapshot can hold, naming it."""
    leaves: list[Any] = []
    paths: list[Path] = []
    root = _learn(state, path, leaves, paths)
    return Shape(root, tuple(paths), list(map(type, leaves))), leaves


def to_plain(value: object) -> object:
    """The state that an object offers of itself, or the value unchanged."""
    for method in ("to_state", "state_dict"):
        offered = getattr(value, method, None)
        if callable(offered) and not isinstance(value, type):
            return offered()
    return value


def _learn(value: Any, path: Path, leaves: list[Any], paths: list[Path]) -> Node:
    first = len(leaves)
    offers = False
    keys: tuple[Any, ...] | None = None
    if isinstance(value, Mapping):
        keys = tuple(value)
        _check_keys(keys, path)
        steps: list[str | int] = [key if isinstance(key, str | int) else repr(key) for key in keys]
        items: list[Any] = list(value.values())
    elif isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        items = list(value)
        steps = list(range(len(items)))
    else:
        plain = to_plain(value)
        if plain is value:
            raise UsageError(
                f"state at {path_name(path) or 'the root'} is a {type(value).__module__}."
                f"{type(value).__qualname__}",
                valid="tensors, numpy arrays, None, bool, int, float, str, bytes; dicts, lists, tuples of them",
                do="give it to_state() and from_state(state), or leave it out of the state",
            )
        offers, items, steps = True, [plain], []
    children: list[Node | None] = []
    for number, item in enumerate(items):
        where = (*path, steps[number]) if steps else path
        if len(where) > limits.TREE_DEPTH_MAX:
            raise UsageError(f"state is nested deeper than {limits.TREE_DEPTH_MAX} at {path_name(path[:4])}…")
        if isinstance(item, LEAVES):
            leaves.append(item)
            paths.append(where)
            children.append(None)
        else:
            children.append(_learn(item, where, leaves, paths))
    flat = not any(children)
    words = () if keys is None else _key_words(keys)
    return Node(type(value), offers, keys, words, tuple(children), flat, len(leaves) - first)


def _follow(node: Node, value: Any, leaves: list[Any]) -> bool:
    kind: type = type(value)
    if kind is not node.kind:
        return False
    items: Any
    if node.offers:
        items = (to_plain(value),)
    elif node.keys is None:
        if len(value) != len(node.children):
            return False
        items = value
    else:
        keys = tuple(value)
        if keys != node.keys or (node.key_words and _key_words(keys) != node.key_words):
            return False
        items = value.values()
    if node.flat:
        leaves.extend(items)
        return True
    for child, item in zip(node.children, items, strict=True):
        if child is None:
            leaves.append(item)
        elif not _follow(child, item, leaves):
            return False
    return True


def _check_keys(keys: tuple[Any, ...], path: Path) -> None:
    for key in keys:
        if not isinstance(key, str | int | float | bool | bytes | tuple | type(None)):
            raise UsageError(
                f"state at {path_name(path)} has a key of type {type(key).__qualname__}",
                valid="str, int, float, bool, bytes, None, or a tuple of them",
            )


def _key_words(keys: tuple[Any, ...]) -> tuple[object, ...]:
    """Nothing for text; for other keys what equality does not tell."""
    kinds = set(map(type, keys))
    if kinds <= {str}:
        return ()
    if kinds <= {str, int}:
        return tuple(map(type, keys))
    return tuple(map(repr, keys))


def is_plain(node: Node) -> bool:
    """Its mapping is a JSON object as it is."""
    return all(isinstance(key, str) and not key.startswith("$") for key in node.keys or ())


def _build(
    node: Node, leaves: Sequence[Any], at: int, built: dict[int, Any], key: Callable[[Any], Any]
) -> Any:
    known = built.get(id(node))
    if known is not None:
        return known
    items = []
    for child in node.children:
        if child is None:
            items.append(leaves[at])
            at += 1
        else:
            items.append(_build(child, leaves, at, built, key))
            at += child.leaves
    if node.offers:
        return items[0]
    if node.keys is None:
        return {"$": "tuple", "v": items} if issubclass(node.kind, tuple) else items
    if is_plain(node):
        return {str(name): item for name, item in zip(node.keys, items, strict=True)}
    return {"$": "dict", "v": [[key(name), item] for name, item in zip(node.keys, items, strict=True)]}


def _build_fixed(
    node: Node,
    leaves: Sequence[Any],
    at: int,
    changing: Sequence[int],
    built: dict[int, Any],
    key: Callable[[Any], Any],
) -> None:
    after = bisect.bisect_left(changing, at)
    if after == len(changing) or changing[after] >= at + node.leaves:
        built[id(node)] = _build(node, leaves, at, built, key)
        return
    for child in node.children:
        if child is None:
            at += 1
        else:
            _build_fixed(child, leaves, at, changing, built, key)
            at += child.leaves
