"""Training functions for the tests, run in workers of the harness. Each reports what it does."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
import socket
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import autoglm_elastic as elastic
from autoglm_elastic.snapshot import _memory
from autoglm_elastic.training import move

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


def hold_snapshot(job: elastic.Job, *, until_leave: bool) -> None:
    """Its votes do not go on until somebody waits for it."""
    snapshots = job._snapshots
    waited_for = threading.Event()
    gather, wait = snapshots._votes.gather, snapshots.wait

    def held_gather(payload: bytes) -> Any:
        say(in_flight=True)
        waited_for.wait()
        return gather(payload)

    def noticed_wait(limit_s: float) -> bool:
        if snapshots.busy:
            say(leaving=job.step)
            if until_leave:
                waited_for.set()
        return wait(600.0)

    snapshots._votes.gather, snapshots.wait = held_gather, noticed_wait


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
    far: bool = False,
    held: str = "",
    loaders: int = 0,
    memory_s: float = _memory.ANSWER_S,
) -> None:
    """A small regression.

    `die`: {"rank", "step"}: that rank stops in the middle of that step of its first generation. `holds`:
    [generation, step, rank]: there that rank waits to be killed, or with rank -1 rank 0 waits to be told to
    go on. `held`: the snapshot of the first generation stays in flight "until a leave" waits for it, or
    "for good". `memory_s`: how long a keeper may take to give memory.
    """
    _memory.ANSWER_S = memory_s
    if far:
        move.place = lambda: [str(os.getpid())]  # as if every worker were on a host of its own
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
        if held and job.generation == 0:
            hold_snapshot(job, until_leave=held == "until a leave")
        say(
            entered=entered,
            generation=job.generation,
            rank=job.rank,
            world=job.world,
            step=job.step,
            tier=job.tier,
        )
        for index, x, y in job.batches(data, batch, epochs=epochs, num_workers=loaders):
            if job.step >= steps:
                break
            if [job.generation, job.step, job.rank] in (holds or []):
                stop_here(holding=job.step)
            if job.rank == 0 and [job.generation, job.step, -1] in (holds or []):
                say(waiting=job.step)
                wait_to_go()
            loss = (model(x) - y).pow(2).mean()
            if die and job.generation == 0 and (job.rank, job.step) == (die["rank"], die["step"]):
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
                loss=loss.item(),
                generation=job.generation,
            )
            job.commit(loss=loss, rank=job.rank)
            say(committed=job.step, generation=job.generation)
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
        torch.manual_seed(0)
        model = job.replicate(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)))
        optim = torch.optim.AdamW(model.parameters(), lr=1e-4)
        job.track(model=model, optim=optim)
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


def lagging(steps: int) -> None:
    """Rank 0 says when it is past a commit that rank 1 never makes: rank 1 waits between reduction and
    commit."""
    entered = 0

    @elastic.run
    def function(job: elastic.Job) -> None:
        nonlocal entered
        entered += 1
        torch.manual_seed(1)
        model = job.replicate(nn.Linear(4, 4))
        optim = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        job.track(model=model, optim=optim)
        while job.step < steps:
            loss = model(torch.randn(2, 4)).pow(2).mean()
            if job.generation == 0 and job.step == 4 and job.rank == 2:
                stop_here(holding=4)
            loss.backward()
            if job.generation == 0 and job.step == 3 and job.rank == 1:
                say(between=3)
                wait_to_go()
                raise RuntimeError("gloo: as if this rank's reduction had failed")
            optim.step()
            optim.zero_grad()
            job.commit(loss=loss)
            say(committed=job.step, generation=job.generation)
        say(result={"digest": digest(dict(model.named_parameters())), "entered": entered})

    function()


def grouped(steps: int) -> None:
    """A group of the user's own; in its third step rank 1 never comes to the collective over it."""
    entered = 0

    @elastic.run
    def function(job: elastic.Job) -> None:
        nonlocal entered
        entered += 1
        torch.manual_seed(4)
        group = dist.new_group(backend="gloo")
        model = job.replicate(nn.Linear(4, 4))
        optim = torch.optim.SGD(model.parameters(), lr=0.1)
        job.track(model=model, optim=optim)
        while job.step < steps:
            if job.generation == 0 and job.step == 3 and job.rank == 1:
                stop_here(holding=3)
            say(meeting=job.step)
            seen = torch.ones(1)
            dist.all_reduce(seen, group=group)
            assert int(seen) == job.world
            model(torch.randn(2, 4)).pow(2).mean().backward()
            optim.step()
            optim.zero_grad()
            job.commit()
        say(result={"digest": digest(dict(model.named_parameters())), "entered": entered})

    function()


def dying(**args: Any) -> None:
    """dying.py"""
    import dying as module

    module.run(say, **args)


def torn(steps: int, gan: bool, lost: int | None = None) -> None:
    """Two optimizers that step one after the other, or a collective between step and commit; rank `lost` is not
    there for what comes after the first optimizer's step of step 6."""

    @elastic.run
    def function(job: elastic.Job) -> None:
        torch.manual_seed(6)
        one, two = job.replicate(nn.Linear(4, 4)), job.replicate(nn.Linear(4, 4))
        optims = [torch.optim.AdamW(net.parameters(), lr=0.1) for net in (one, two)]
        job.track(one=one, two=two, first=optims[0], second=optims[1])
        x = torch.ones(2, 4)
        while job.step < steps:
            one(x).pow(2).mean().backward()
            if not gan:
                two(x).pow(2).mean().backward()
                optims[1].step()
            optims[0].step()
            if job.generation == 0 and job.step == 5 and job.rank == lost:
                stop_here(holding=5)
            if gan:
                two(one(x).detach()).pow(2).mean().backward()
                optims[1].step()
            else:
                dist.all_reduce(torch.ones(1))
            for optim in optims:
                optim.zero_grad()
            job.commit()
        say(
            result={
                "digest": digest(
                    dict(one.named_parameters()) | {f"2{n}": p for n, p in two.named_parameters()}
                )
            }
        )

    function()


def commits(value: str, calls: int = 1) -> None:
    """One step with this loss, in as many calls."""
    losses = {"vector": torch.ones(3), "text": "1", "complex": torch.tensor(1j), "number": torch.tensor(1)}

    @elastic.run
    def function(job: elastic.Job) -> None:
        job.track(model=job.replicate(nn.Linear(4, 4)))
        job.commit(loss=losses[value])
        say(steps=job.step)

    for _ in range(calls):
        function()


def failing(step: int, rank: int | None = None) -> None:
    """An error of the user's own: on all ranks, or on one in the first generation only."""

    @elastic.run
    def function(job: elastic.Job) -> None:
        model = job.replicate(nn.Linear(4, 4))
        job.track(model=model)
        while job.step < step + 2:
            if job.step == step and (rank is None or (job.generation, job.rank) == (0, rank)):
                raise KeyError("the user's own")
            model(torch.randn(2, 4)).sum().backward()
            job.commit()

    function()


def many_kinds(steps: int, untracked: bool = False) -> None:
    """Two modules and optimizers, an unused parameter, accumulation, a scheduler tracked on its own, a
    Counter."""
    entered = 0

    @elastic.run
    def function(job: elastic.Job) -> None:
        nonlocal entered
        entered += 1
        torch.manual_seed(2)
        first, second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2), nn.Linear(3, 3))
        job.replicate(first)
        job.replicate(second)
        one = torch.optim.AdamW(
            [{"params": [first.weight]}, {"params": [first.bias], "weight_decay": 0.0}], lr=0.1
        )
        two = torch.optim.SGD(second.parameters(), lr=torch.tensor(0.1), momentum=0.5)
        job.track(first=first, second=second, one=one, two=two)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(one, [2, 5], gamma=0.5)
        job.track(scheduler=scheduler)
        say(entered=entered, lr=one.param_groups[0]["lr"], step=job.step)
        while job.step < steps:
            if job.generation == 0 and job.step == 6 and job.rank == 1:
                stop_here(holding=6)
            with job.accumulate():
                second[0](first(torch.randn(3, 4))).pow(2).mean().backward()
            second[0](first(torch.randn(3, 4))).pow(2).mean().backward()
            assert second[1].weight.grad is None, "no rank used it"
            one.step()
            two.step()
            one.zero_grad()
            two.zero_grad()
            scheduler.step()
            job.commit()
        tensors = dict(first.named_parameters()) | {f"2{k}": v for k, v in second.named_parameters()}
        say(result={"digest": digest(tensors), "lr": one.param_groups[0]["lr"], "entered": entered})

    function()


def tracked_one_by_one(steps: int) -> None:
    """In the first generation rank 0 waits to be killed, and the others for it, with one of three objects tracked."""

    @elastic.run
    def function(job: elastic.Job) -> None:
        torch.manual_seed(3)
        model = job.replicate(nn.Linear(4, 4))
        optim = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optim, 2, gamma=0.5)
        job.track(model=model)
        if job.generation == 0:
            say(tracked=1)
            if job.rank == 0:
                stop_here(holding=0)
            dist.barrier()
        job.track(optim=optim)
        job.track(scheduler=scheduler)
        while job.step < steps:
            model(torch.randn(2, 4)).pow(2).mean().backward()
            optim.step()
            optim.zero_grad()
            scheduler.step()
            job.commit()
        say(result={"digest": digest(dict(model.named_parameters())), "tier": job.tier})

    function()


def only_replicated(steps: int) -> None:
    """Never calls track."""
    entered = 0

    @elastic.run
    def function(job: elastic.Job) -> None:
        nonlocal entered
        entered += 1
        torch.manual_seed(3)
        model = job.replicate(nn.Linear(4, 4))
        while job.step < steps:
            loss = model(torch.randn(2, 4)).pow(2).mean()
            if job.generation == 0 and job.step == 3 and job.rank == 1:
                stop_here(holding=3)
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
            job.commit()
        say(result={"digest": digest(dict(model.named_parameters())), "entered": entered})

    function()


def reduces(weights: list[int]) -> None:
    """One reduction compared with a single process that sees all samples; counts by samples, not by ranks."""

    @elastic.run
    def function(job: elastic.Job) -> None:
        torch.manual_seed(5)
        model = job.replicate(
            nn.Sequential(nn.Linear(6, 700), nn.ReLU(), nn.Linear(700, 500), nn.Linear(500, 1))
        )
        reference = copy.deepcopy(model)
        x = torch.randn(sum(weights), 6)
        dataset = torch.utils.data.TensorDataset(x)
        for (mine,) in job.batches(dataset, len(x), shuffle=False):
            for _ in range(2):
                model(mine).pow(2).mean().backward()
            for _ in range(2):
                reference(x).pow(2).mean().backward()
            worst = max(
                float((p.grad - q.grad).abs().max())
                for p, q in zip(model.parameters(), reference.parameters(), strict=True)
            )
            say(result={"worst": worst, "local": job.local_samples})
            job.commit()

    function()
