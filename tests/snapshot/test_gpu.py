"""CUDA tensors: staged through pinned memory, loaded in place on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoglm_elastic.snapshot import CheckpointManager

pytestmark = pytest.mark.gpu
WAIT_S = 60.0


def test_cuda_state_is_that_of_the_boundary(run_dir: Path) -> None:
    weight = torch.zeros(1 << 20, device="cuda")
    half = torch.ones(3, 5, device="cuda", dtype=torch.bfloat16).t()
    with CheckpointManager(run_dir) as manager:
        for step in range(3):
            weight.fill_(step)
            handle = manager.save(step, {"w": weight, "h": half, "cpu": torch.ones(2)})
            weight.fill_(-1)
            assert handle.wait(WAIT_S).committed
        for entry in manager.entries():
            target = {
                "w": torch.full((1 << 20,), 9.0, device="cuda"),
                "h": torch.zeros(5, 3, device="cuda", dtype=torch.bfloat16),
                "cpu": torch.zeros(2, device="cuda"),
            }
            kept = target["w"]
            manager.load(target, entry=entry)
            assert target["w"] is kept
            assert kept.unique().tolist() == [entry.step]
            assert target["h"].cpu().tolist() == half.cpu().tolist()
            assert target["cpu"].tolist() == [1, 1]
            assert manager.verify(entry) == []
