"""Loading into a live state, in place: what in the target takes what of the snapshot, then reading, then the
rest.

Nothing is changed before the whole target has been matched with the stored structure, so a snapshot that does
not fit leaves the state as it was. A snapshot that turns out corrupt while tensors are read leaves them
partly overwritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from autoglm_elastic.catalog import tree
from autoglm_elastic.catalog.format import Manifest
from autoglm_elastic.errors import UsageError
from autoglm_elastic.ports import StreamBlobs, Votes
from autoglm_elastic.snapshot.boxes import placed
from autoglm_elastic.snapshot.dtypes import torch_dtype
from autoglm_elastic.snapshot.pauses import collection_paused
from autoglm_elastic.snapshot.read import read_tensors
from autoglm_elastic.snapshot.scatter import Target
from autoglm_elastic.snapshot.share import excused, read_together

Finish = Callable[[], Any]
"""Called after the tensors were read; returns what belongs in the target's place."""

_SHOWN_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class LoadReport:
    """`missing`: in the target, not in the snapshot (left as it was). `unexpected`: stored, not asked for.
    `nbytes`: that this rank read from where the snapshot lies."""

    entry: str
    step: int
    generation: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    nbytes: int


def load_into(
    blobs: StreamBlobs,
    manifest: Manifest,
    state: MutableMapping[str, Any],
    strict: bool,
    *,
    rank: int,
    world_size: int,
    votes: Votes | None = None,
) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """(missing, unexpected, nbytes), as in LoadReport. Raises UsageError where the state does not fit,
    CorruptSnapshot.

    Args:
        votes: all ranks load this now, and read together over it.
    """
    with collection_paused():
        loader = _Loader(manifest)
        with excused(votes):
            finish = _matched(loader, state, strict)
        if votes is None:
            nbytes = read_tensors(blobs, manifest, loader.targets, rank=rank, world_size=world_size)
        else:
            nbytes = read_together(blobs, manifest, loader.targets, votes)
        finish()
    return tuple(loader.missing), tuple(loader.unexpected), nbytes


def _matched(loader: _Loader, state: MutableMapping[str, Any], strict: bool) -> Finish:
    """Raises UsageError where the state does not fit."""
    finish = loader.match(state, loader.manifest.tree, ())
    if strict and (loader.missing or loader.unexpected):
        parts = [
            f"{len(names)} {what} ({', '.join(names[:_SHOWN_MAX])}{', …' if len(names) > _SHOWN_MAX else ''})"
            for what, names in (("missing", loader.missing), ("unexpected", loader.unexpected))
            if names
        ]
        raise UsageError(
            f"the snapshot does not fit the state: {'; '.join(parts)}", do="load with strict=False"
        )
    return finish


class _Loader:
    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.targets: list[Target] = []
        self.missing: list[str] = []
        self.unexpected: list[str] = []

    def match(self, target: Any, node: Any, path: tree.Path) -> Finish:
        if isinstance(target, torch.Tensor):
            return self._tensor(target, node, path)
        if isinstance(target, np.ndarray):
            return self._array(target, node, path)
        if isinstance(target, MutableMapping) and target:
            return self._mapping(target, node, path)
        if isinstance(target, list | tuple) and target:
            return self._sequence(target, node, path)
        if (
            isinstance(target, MutableMapping)
            and isinstance(node, dict)
            and tree.code_of(node) in (None, "dict")
        ):
            return self._fill(target, self._take(node))
        if callable(getattr(target, "from_state", None)):
            return self._object(target.from_state, self._take(node), target)
        if callable(getattr(target, "load_state_dict", None)):
            return self._object(target.load_state_dict, self.match(target.state_dict(), node, path), target)
        return self._take(node)

    def _tensor(self, target: torch.Tensor, node: Any, path: tree.Path) -> Finish:
        name = node["v"] if tree.code_of(node) == "tensor" else None
        if name is None:
            return self._absent(target, path, node)
        where = placed(target, tree.path_name(path))
        stored = self.manifest.tensors[name]
        if (stored.dtype, stored.shape) != (where.dtype.name, where.shape):
            raise UsageError(
                f"tensor {tree.path_name(path)} is {where.dtype.name} {list(where.shape)} here",
                valid=f"{stored.dtype} {list(stored.shape)} as in the snapshot",
                do="build the model as it was, or leave the tensor out of the state",
            )
        self.targets.append(Target(name, where.box, where.local))
        return lambda: target

    def _array(self, target: np.ndarray[Any, Any], node: Any, path: tree.Path) -> Finish:
        if tree.code_of(node) != "array":
            return self._absent(target, path, node)
        stored = self.manifest.tensors[node["v"]]
        if target.flags.writeable and target.flags.c_contiguous and target.shape == stored.shape:
            whole = torch.from_numpy(target)
            if whole.dtype == torch_dtype(stored.dtype):
                self.targets.append(Target(node["v"], ((0,) * target.ndim, stored.shape), whole))
                return lambda: target
        return self._take(node)

    def _mapping(self, target: MutableMapping[Any, Any], node: Any, path: tree.Path) -> Finish:
        inside = (
            tree.children(node)
            if tree.code_of(node) in (None, "dict") and not isinstance(node, list)
            else None
        )
        if inside is None:
            return self._absent(target, path, node)
        places: dict[Any, Finish] = {}
        asked = set()
        for key, item in target.items():
            at = (*path, key if isinstance(key, str | int) else repr(key))
            # torch.distributed.checkpoint writes every key as text.
            stored = str(key) if isinstance(key, int) and key not in inside else key
            if stored in inside:
                asked.add(stored)
                places[key] = self.match(item, inside[stored], at)
            else:
                self._note_missing(item, at)
        for key in inside:
            if key not in asked:
                self.unexpected.append(
                    tree.path_name((*path, key if isinstance(key, str | int) else repr(key)))
                )

        def finish() -> Any:
            for key, place in places.items():
                value = place()
                if value is not target[key]:
                    target[key] = value
            return target

        return finish

    def _sequence(self, target: list[Any] | tuple[Any, ...], node: Any, path: tree.Path) -> Finish:
        inside = tree.children(node) if isinstance(node, list) or tree.code_of(node) == "tuple" else None
        if inside is None or len(inside) != len(target):
            if _has_tensor(target):
                return self._absent(target, path, node)
            return self._take(node)
        places = [self.match(item, inside[index], (*path, index)) for index, item in enumerate(target)]

        def finish() -> Any:
            values = [place() for place in places]
            if isinstance(target, list):
                target[:] = values
                return target
            return tuple(values)

        return finish

    def _fill(self, target: MutableMapping[Any, Any], taken: Finish) -> Finish:
        def finish() -> Any:
            target.update(taken())
            return target

        return finish

    def _object(self, put: Callable[[Any], object], inner: Finish, target: Any) -> Finish:
        def finish() -> Any:
            put(inner())
            return target

        return finish

    def _take(self, node: Any) -> Finish:
        """The stored value itself; its tensors whole, in new memory on the CPU."""
        fresh: dict[str, torch.Tensor] = {}

        def tensor(name: str) -> torch.Tensor:
            if name not in fresh:
                stored = self.manifest.tensors[name]
                fresh[name] = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype))
                self.targets.append(Target(name, ((0,) * len(stored.shape), stored.shape), fresh[name]))
            return fresh[name]

        value = tree.decode(node, tensor, lambda name: tensor(name).numpy())
        return lambda: value

    def _absent(self, target: Any, path: tree.Path, node: Any) -> Finish:
        """What stands there is of another kind: both sides are reported, the target stays."""
        self._note_missing(target, path)
        self.unexpected.append(f"{tree.path_name(path)} ({_kind(node)})")
        return lambda: target

    def _note_missing(self, item: Any, path: tree.Path) -> None:
        """An empty container asks for nothing, so it misses nothing."""
        if not (isinstance(item, Mapping | list | tuple) and not item):
            self.missing.append(tree.path_name(path))


def _kind(node: Any) -> str:
    code = tree.code_of(node)
    if code is not None:
        return code
    return "dict" if isinstance(node, dict) else type(node).__name__


def _has_tensor(value: Any) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return True
    if isinstance(value, Mapping):
        return any(_has_tensor(item) for item in value.values())
    return isinstance(value, list | tuple) and any(_has_tensor(item) for item in value)
