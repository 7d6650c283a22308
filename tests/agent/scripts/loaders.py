"""torch as a script uses it: DataLoader workers, processes, threads, an optimizer, random streams."""

import os
import random
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.get_num_threads()])


def fill(index: int, shared: torch.Tensor) -> None:
    shared[index] = index + 1


def main() -> None:
    for method in sys.argv[1:]:
        loader = DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context=method)
        print(method, sum(batch[:, 0].sum().item() for batch in loader))
    shared = torch.zeros(2).share_memory_()
    torch.multiprocessing.start_processes(fill, (shared,), nprocs=2, start_method="fork")
    print(shared.tolist())
    model = torch.nn.Linear(64, 64)
    optim = torch.optim.AdamW(model.parameters())
    model(torch.ones(512, 64)).sum().backward()
    optim.step()
    big = torch.ones(512, 512)
    print((big @ big).sum().item(), (np.ones((512, 512)) @ np.ones((512, 512))).sum())
    print("threads", torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS"))
    print(
        "random",
        torch.initial_seed(),
        torch.rand(1).item(),
        np.random.rand(),
        random.random(),
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
