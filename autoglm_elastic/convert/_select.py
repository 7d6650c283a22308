"""Which part of a snapshot is exported, and under which names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from autoglm_elastic.catalog import tree
from autoglm_elastic.catalog.format import Manifest
from autoglm_elastic.errors import UsageError

OnBytes = Callable[[int], None]

_SHOWN_MAX: Final = 8


def subtree(manifest: Manifest, prefix: str) -> Any:
    """The node at `prefix` ("" for the whole), a path as `autoglm ckpt show` writes it; its last part may be the
    beginning that keys have in common, as `module` of "module.weight". Raises UsageError."""
    node = manifest.tree
    at = ""
    while prefix:
        inside = tree.children(node) or {}
        found = [key for key in inside if prefix == str(key) or prefix.startswith(f"{key}.")]
        begun = {
            key.removeprefix(f"{prefix}."): child
            for key, child in inside.items()
            if isinstance(key, str)
            and key.startswith(f"{prefix}.")
            and key[len(prefix) + 1 :][:1] not in ("", "$")
        }
        if not found and begun:
            return begun
        if not found:
            valid = ", ".join(str(key) for key in list(inside)[:_SHOWN_MAX])
            raise UsageError(
                f"nothing at {prefix!r} of {at or 'the state'}", valid=valid or "nothing is below it"
            )
        key = max(found, key=lambda one: len(str(one)))
        node, at, prefix = inside[key], f"{at}.{key}" if at else str(key), prefix[len(str(key)) + 1 :]
    return node


def tensors_below(node: Any) -> dict[str, str]:
    """Path below `node` → name of the stored tensor; tied tensors appear under each of their paths."""
    found: dict[str, str] = {}

    def walk(item: Any, path: tree.Path) -> None:
        if tree.code_of(item) in ("tensor", "array"):
            found[tree.path_name(path) or "value"] = item["v"]
            return
        for key, child in (tree.children(item) or {}).items():
            walk(child, (*path, key if isinstance(key, str | int) else repr(key)))

    walk(node, ())
    return found
