"""A training that goes on until a file says after which step it ends. Convex, so that rounding does not add up."""

import argparse
import json
import os
import time
from pathlib import Path

import torch

import autoglm_elastic as elastic

parser = argparse.ArgumentParser()
parser.add_argument("end", type=Path)
parser.add_argument("--pause-s", type=float, default=0.0)
options = parser.parse_args()

SAMPLES = 1 << 20
WIDTH = 16


def report(**fields: object) -> None:
    os.write(1, json.dumps({"pid": os.getpid(), **fields}).encode() + b"\n")


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))


@elastic.run
def train(job: elastic.Job) -> None:
    torch.manual_seed(7)
    model = job.replicate(torch.nn.Linear(WIDTH, 1))
    optim = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    job.track(model=model, optim=optim)
    end = -1
    for x in job.batches(Samples(), global_batch_size=12, epochs=100):
        if end < 0 and options.end.exists():
            end = int(options.end.read_text())
        if job.step == end:
            break
        loss = (model(x) - x.sin().sum(1, keepdim=True).exp()).square().mean()
        loss.backward()
        optim.step()
        optim.zero_grad()
        time.sleep(options.pause_s)
        report(rank=job.rank, step=job.step + 1, world=job.world)
        job.commit(loss=loss)
    report(rank=job.rank, weights=model.weight.sum().item(), final=job.step)


train()
