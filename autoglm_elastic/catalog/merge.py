"""The coordinator's arithmetic: from what each rank has prepared to the manifest of the whole. Pure.

Its work and memory are O(ranks + tensors): the ranks' chunk tables stay in their packs, and ranks that know
the same structure send it once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import limits, tree
from autoglm_elastic.errors import UsageError


def structure_digest(structure: fmt.Structure) -> str:
    """Equal for ranks that know the same tensors in the same places; values in the tree do not count."""
    bare = fmt.Structure(tensors=structure.tensors, tree=tree.skeleton(structure.tree))
    return hashlib.sha256(fmt.encode(bare)).hexdigest()


def representatives(prepared: Sequence[fmt.Prepared]) -> list[int]:
    """The ranks whose structures make the whole: the lowest of each kind, rank 0 first."""
    first: dict[str, int] = {}
    for rank, one in enumerate(prepared):
        first.setdefault(one.structure, rank)
    return sorted(first.values())


def earliest(prepared: Iterable[fmt.Prepared]) -> float | None:
    """The `since` of them all together."""
    return min((one.since for one in prepared if one.since is not None), default=None)


def merge(
    prepared: Sequence[fmt.Prepared],
    structures: Mapping[str, fmt.Structure],
    *,
    step: int,
    generation: int,
    world_size: int,
    environment: dict[str, str],
    config_digest: str | None,
) -> fmt.Manifest:
    """Packs in the order of ranks, structures united (rank 0's values count).

    Args:
        structures: by digest, at least those of the representatives.

    Raises UsageError when the ranks' parts do not make one whole state.
    """
    tensors: dict[str, fmt.Tensor] = {}
    united: Any = None
    for number, rank in enumerate(representatives(prepared)):
        structure = structures[prepared[rank].structure]
        for name, tensor in structure.tensors.items():
            if tensors.setdefault(name, tensor) != tensor:
                raise UsageError(
                    f"tensor {name} is {tensor.dtype} {list(tensor.shape)} on rank {rank}",
                    valid=f"{tensors[name].dtype} {list(tensors[name].shape)} as on a lower rank",
                )
        united = structure.tree if number == 0 else tree.merge(united, structure.tree)
    problem = _cover_problem(tensors, sum(one.cover for one in prepared))
    if problem:
        raise UsageError(
            problem,
            valid="every rank knows every plain tensor, in the same shape",
            do="make what differs between ranks a DTensor, or give all ranks a tensor of that name",
        )
    packs: dict[str, fmt.Pack] = {}
    for one in prepared:
        for pack in one.packs:
            packs.setdefault(pack.sha256, pack)
    return fmt.Manifest(
        format=limits.FORMAT_NAME,
        version=limits.FORMAT_VERSION,
        step=step,
        generation=generation,
        world_size=world_size,
        packs=tuple(packs.values()),
        tensors=tensors,
        tree=united,
        environment=environment,
        config_digest=config_digest,
    )


def _cover_problem(tensors: Mapping[str, fmt.Tensor], written: int) -> str:
    """ "" when what was written covers every tensor once, as far as the sums tell; else what is wrong, with the
    tensor's name where it is a single one."""
    parts = [(name, fmt.elements(tensor.shape)) for name, tensor in tensors.items()]
    missing = (fmt.cover(parts) - written) % (1 << 64)
    if not missing:
        return ""
    for name, elements in parts:
        wrote = elements - fmt.uncovered(name, missing)
        if 0 <= wrote < elements:
            return f"tensor {name!r}: the ranks wrote {wrote} of {elements} elements"
        if elements < wrote + (1 << 64) <= 2 * elements:
            return f"tensor {name!r}: some of its elements were written twice"
    return "the parts that the ranks wrote do not cover the state exactly once"
