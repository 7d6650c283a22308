"""Saves or loads in a loop while others collect: `python busy.py save|load RUN ROUNDS`. Ends with what went wrong."""

from __future__ import annotations

import sys

import torch

from autoglm_elastic.errors import UsageError
from autoglm_elastic.snapshot import CheckpointManager


def save(run: str, rounds: int) -> None:
    """Old contents again under new steps: packs whose names are garbage come back to life."""
    with CheckpointManager(run) as manager:
        first = manager.newest()
        begin = 0 if first is None else first.step + 1
        for number in range(rounds):
            result = manager.save(begin + number, {"a": torch.full((2000,), float(number % 5))}).wait(30)
            if result.entry is None or manager.verify(result.entry):
                raise SystemExit(f"{result}: {manager.verify(result.entry or '')}")


def load(run: str, rounds: int) -> None:
    """The newest, and the oldest that is still there when it is looked for."""
    with CheckpointManager(run) as manager:
        for _ in range(rounds):
            manager.load({"a": torch.empty(2000)})
            oldest = manager.entries()[0].name
            try:
                manager.load({"a": torch.empty(2000)}, entry=oldest)
            except UsageError as error:
                if "no snapshot" not in str(error):
                    raise


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
