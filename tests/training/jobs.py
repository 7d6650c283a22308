"""Training functions for the tests, run in workers of the harness. Each reports what it does."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import autoglm_elastic as elastic

_report: socket.socket | None = None


def say(**what: Any) -> None:
    if _report is not None:
        _report.send(json.dumps(what).encode())


def wait_to_go() -> None:
    assert _report is not None
    _report.recv(16)


def stop_here(**what: Any) -> None:
    """Say so, then wait to be killed."""
    say(**what)
    while True:
        signal.pause()


def digest(tensors: dict[str, torch.Tensor]) -> str:
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        sha256.update(name.encode())
        sha256.update(tensors[name].detach().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(name: str, args: dict[str, Any]) -> None:
    global _report
    if "TEST_REPORT_FD" in os.environ:
        _report = socket.socket(fileno=int(os.environ["TEST_REPORT_FD"]))
    globals()[name](**args)


class Regression(torch.utils.data.Dataset):
    """(index, x, y): deterministic."""

    def __init__(self, size: int, width: int = 8) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(size, width, generator=generator)
        self.y = self.x.sin().sum(1, keepdim=True)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return index, self.x[index], self.y[index]


def train(
    steps: int,
    die: dict[str, int] | None = None,
    batch: int = 8,
    size: int = 64,
    dropout: float = 0.0,
    scheduler: bool = False,
    norm: bool = False,
    holds: list[list[int]] | None = None,
    swallow: bool = False,
    shard: bool = False,
    frozen: bool = False,
    ask_at: int = -1,
    paced: bool = False,
    epochs: int = 1000,
) -> None:
    """A small regression.

    `die`: {"rank", "step"}: that rank stops in the middle of that step of its first generation. `holds`: [generation,
    step, rank]: there that rank waits to be killed, or with rank -1 rank 0 waits to be told to go on.
    """
    data = Regression(size)
    entered = 0

    @elastic.run
    def function(job: elastic.Job) -> None:
        nonlocal entered
        entered += 1
        torch.manual_seed(7)
        layers = [nn.Linear(8, 16), nn.Tanh()]
        if norm:
            layers.append(nn.BatchNorm1d(16))
        if dropout:
            layers.append(nn.Dropout(dropout))
        net = nn.Sequential(*layers, nn.Linear(16, 1))
        if frozen:
            net[0].bias.requires_grad_(False)
        model = job.shard(net) if shard else job.replicate(net)
        optim = torch.optim.AdamW(model.parameters(), lr=0.01)
        tracked: dict[str, Any] = {"model": model, "optim": optim}
        if scheduler:
            tracked["scheduler"] = torch.optim.lr_scheduler.StepLR(optim, 2, gamma=0.7)
        job.track(**tracked)
        say(entered=entered, generation=job.generation, rank=job.rank, world=job.world, step=job.step, tier=job.tier)
        for index, x, y in job.batches(data, batch, epochs=epochs):
            if job.step >= steps:
                break
            if [job.generation, job.step, job.rank] in (holds or []):
                stop_here(holding=job.step)
            if job.rank == 0 and [job.generation, job.step, -1] in (holds or []):
                say(waiting=job.step)
                wait_to_go()
            loss = (model(x) - y).pow(2).mean()
            if die and entered == 1 and job.generation == die.get("generation", 0):
                if (job.rank, job.step) == (die["rank"], die["step"]):
                    stop_here(dying=job.step)
            if swallow:
                try:
                    loss.backward()
                except Exception as error:
                    say(swallowed=type(error).__name__)
            else:
                loss.backward()
            optim.step()
            optim.zero_grad()
            if scheduler:
                tracked["scheduler"].step()
            say(
                trying=job.step + 1,
                rank=job.rank,
                indices=index.tolist() if job.local_samples else [],
                generation=job.generation,
            )
            job.commit(loss=loss)
            say(committed=job.step, generation=job.generation, loss=loss.item())
            if job.step == ask_at:
                job.snapshot()
            if paced and job._snapshots is not None:
                job._snapshots.wait(30)
        state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        moments = {f"{i}.{k}": whole(v) for i, s in enumerate(optim.state.values()) for k, v in s.items()}
        say(
            result={
                "digest": digest(state | moments),
                "step": job.step,
                "entered": entered,
                "pid": os.getpid(),
                "weights": [float(whole(p).double().sum()) for p in model.parameters()],
                "lr": optim.param_groups[0]["lr"],
            }
        )

    function()


def mlp(width: int = 2236) -> None:
    """For the measurement: 10 million parameters, until killed."""
    @elastic.run
    def function(job: elastic.Job) -> None:
        c = [time.process_time(), time.thread_time()]
        torch.manual_seed(0)
        model = job.replicate(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)))
        optim = torch.optim.AdamW(model.parameters(), lr=1e-4)
        c += [time.process_time(), time.thread_time()]
        job.track(model=model, optim=optim)
        c += [time.process_time(), time.thread_time()]
        say(cpu=[round(x*1e3) for x in c])
        began = time.time()
        while True:
            loss = model(torch.randn(8, width)).pow(2).mean()
            loss.backward()
            optim.step()
            optim.zero_grad()
            job.commit(loss=loss)
            now = time.time()
            say(committed=job.step, generation=job.generation, at=now, took=now - began)
            began = now

    function()
