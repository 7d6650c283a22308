"""Run directories for the tests of the catalog: real snapshots of small states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.core.lineage import GenerationRecord
from autoglm_elastic.snapshot import CheckpointManager
from autoglm_elastic.storage import LocalBlobs

WAIT_S = 30.0


def state(step: int) -> dict[str, Any]:
    """Some of it changes with the step, some does not."""
    return {
        "model": {
            "weight": torch.arange(24.0).view(4, 6) + step,
            "frozen": torch.ones(8, dtype=torch.bfloat16),
        },
        "lr": 0.5**step,
        "step": step,
    }


def save(
    run_dir: Path, *steps: int, generation: int = 0, whole: Mapping[str, Any] | None = None, **options: Any
) -> list[str]:
    """Committed snapshots of these steps; their names."""
    names = []
    with CheckpointManager(run_dir, generation=generation) as manager:
        for step in steps:
            result = manager.save(step, whole or state(step), **options).wait(WAIT_S)
            if result.entry is None:
                raise AssertionError(result.reason)
            names.append(result.entry)
    return names


def record(run_dir: Path, number: int, parent: int = -1, step: int = -1, entry: str | None = None) -> None:
    Catalog(LocalBlobs(run_dir)).put_generation(GenerationRecord(number, parent, step, entry, "disk"))


def names(run_dir: Path) -> list[str]:
    return Catalog(LocalBlobs(run_dir)).names()


def load(run_dir: Path, entry: str | None = None) -> dict[str, Any]:
    target: dict[str, Any] = {"model": {}, "lr": None, "step": None}
    with CheckpointManager(run_dir) as manager:
        manager.load(target, entry=entry)
    return target
