"""What differs between two snapshots, by the digests of their chunks: no data are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import tree
from autoglm_elastic.catalog.opened import OpenPacks
from autoglm_elastic.ports import StreamBlobs

What = Literal["added", "removed", "dtype", "shape", "bytes", "unknown"]


class TensorChange(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that is not the same in both. `what` is unknown where both are cut into other chunks, whose digests
    say nothing about each other. `bytes_changed`: of the chunks that differ. `max_abs`: the largest absolute difference
    of two elements, where values were compared and are numbers of one shape (null otherwise, also for a NaN against a
    number); `elements_changed`: how many differ in value."""

    name: str
    what: What
    before: str = ""
    after: str = ""
    bytes_changed: int = 0
    max_abs: float | None = None
    elements_changed: int | None = None


class ValueChange(msgspec.Struct, frozen=True, kw_only=True):
    """A value beside the tensors, by its path; null where it is not there (or is null)."""

    path: str
    what: Literal["added", "removed", "changed"]
    before: Any = None
    after: Any = None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    before: str
    after: str
    tensors: tuple[TensorChange, ...]
    values: tuple[ValueChange, ...]
    same: int
    """Tensors whose every byte is the same."""


def diff(blobs: StreamBlobs, names: tuple[str, str], before: fmt.Manifest, after: fmt.Manifest) -> Difference:
    """Raises CorruptSnapshot for a damaged header."""
    with OpenPacks(blobs, before) as one, OpenPacks(blobs, after) as other:
        old, new = one.all_chunks(), other.all_chunks()
    changes = []
    for name in sorted({*before.tensors, *after.tensors}):
        change = _tensor(
            name, before.tensors.get(name), after.tensors.get(name), old.get(name, ()), new.get(name, ())
        )
        if change is not None:
            changes.append(change)
    return Difference(
        before=names[0],
        after=names[1],
        tensors=tuple(changes),
        values=tuple(_values(before.tree, after.tree)),
        same=len({*before.tensors, *after.tensors}) - len(changes),
    )


def _tensor(
    name: str,
    before: fmt.Tensor | None,
    after: fmt.Tensor | None,
    old: Sequence[fmt.Chunk],
    new: Sequence[fmt.Chunk],
) -> TensorChange | None:
    if before is None or after is None:
        what: What = "removed" if after is None else "added"
        return TensorChange(name=name, what=what, before=_form(before), after=_form(after))
    if before.dtype != after.dtype:
        return TensorChange(name=name, what="dtype", before=_form(before), after=_form(after))
    if before.shape != after.shape:
        return TensorChange(name=name, what="shape", before=_form(before), after=_form(after))
    if [chunk.sha256 for chunk in old] == [chunk.sha256 for chunk in new] and _boxes(old) == _boxes(new):
        return None
    form = _form(after)
    if _boxes(old) != _boxes(new):
        return TensorChange(name=name, what="unknown", before=form, after=form)
    changed = sum(one.nbytes for one, other in zip(old, new, strict=True) if one.sha256 != other.sha256)
    return TensorChange(name=name, what="bytes", before=form, after=form, bytes_changed=changed)


def _boxes(chunks: Sequence[fmt.Chunk]) -> list[fmt.Box]:
    return [(chunk.offsets, chunk.sizes) for chunk in chunks]


def _form(tensor: fmt.Tensor | None) -> str:
    return "" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _values(before: Any, after: Any) -> list[ValueChange]:
    old, new = _leaves(before), _leaves(after)
    changes = []
    for path in sorted({*old, *new}):
        if path not in old:
            changes.append(ValueChange(path=path, what="added", after=new[path]))
        elif path not in new:
            changes.append(ValueChange(path=path, what="removed", before=old[path]))
        elif msgspec.json.encode(old[path]) != msgspec.json.encode(new[path]):
            changes.append(ValueChange(path=path, what="changed", before=old[path], after=new[path]))
    return changes


def _leaves(node: Any) -> Mapping[str, Any]:
    """Path → JSON of every leaf that is no tensor; an empty container is a leaf."""
    found: dict[str, Any] = {}

    def walk(item: Any, path: tree.Path) -> None:
        inside = tree.children(item)
        if inside:
            for key, child in inside.items():
                walk(child, (*path, key if isinstance(key, str | int) else repr(key)))
        elif tree.code_of(item) != "tensor" and tree.code_of(item) != "array":
            found[tree.path_name(path)] = item

    walk(node, ())
    return found
