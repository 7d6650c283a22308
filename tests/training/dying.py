"""A training whose workers kill themselves at named points, and the points.

`kills`: dicts of generation, rank, point and count: the worker that has that rank in that generation dies as it
passes the point for the count-th time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import autoglm_elastic as elastic
from autoglm_elastic.training import agreement, groups, reduce, session, snapshots, state

STEP_POINTS = ("batch", "forward", "bucket", "backward", "optimizer", "stepped", "committing", "committed")
SNAPSHOT_POINTS = ("staging", "staged", "voting", "deciding")
RECOVERY_POINTS = ("joining", "building", "planned", "entered", "restoring", "restored")
POINTS = STEP_POINTS + SNAPSHOT_POINTS + RECOVERY_POINTS

Kill = dict[str, Any]
Where = Callable[[], tuple[int, int]]


class Points:
    """Counts how often each point is passed in the present generation."""

    def __init__(self, kills: list[Kill], say: Callable[..., None]) -> None:
        self._kills, self._say = kills, say
        self._passed: Counter[str] = Counter()
        self._where = (-1, -1)

    def enter(self, generation: int, rank: int) -> None:
        if (generation, rank) != self._where:
            self._where = (generation, rank)
            self._passed.clear()

    def pass_(self, point: str) -> None:
        self._passed[point] += 1
        generation, rank = self._where
        here = {"generation": generation, "rank": rank, "point": point, "count": self._passed[point]}
        if here in self._kills:
            self._say(died=here)
            os.kill(os.getpid(), signal.SIGKILL)


class SlowlySteppingAdamW(torch.optim.AdamW):
    """Dies, if so, when one group has been stepped and the next has not."""

    def __init__(self, parameters: list[dict[str, Any]], points: Points, **options: Any) -> None:
        self._points = points
        super().__init__(parameters, **options)

    def _init_group(self, group: dict[str, Any], *rest: Any) -> Any:
        if group is self.param_groups[-1]:
            self._points.pass_("optimizer")
        return super()._init_group(group, *rest)


def before(owner: Any, name: str, call: Callable[..., None]) -> None:
    inner = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        call(*args, **kwargs)
        return inner(*args, **kwargs)

    setattr(owner, name, outer)


def after(owner: Any, name: str, call: Callable[[], None]) -> None:
    inner = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        value = inner(*args, **kwargs)
        call()
        return value

    setattr(owner, name, outer)


def instrument(points: Points) -> None:
    """Points in the rooms of training/; this process is of the test alone."""
    reduce.FIRST_BUCKET_BYTES = reduce.BUCKET_BYTES = 256
    before(
        groups.Groups,
        "connect",
        lambda self, *_: (points.enter(self.generation, self.rank), points.pass_("joining")),
    )
    before(groups.Groups, "build", lambda *_: points.pass_("building"))
    after(session, "agree", lambda: points.pass_("planned"))
    after(reduce.Reducer, "_launch", lambda: points.pass_("bucket"))
    before(state.State, "track", lambda *_, **__: points.pass_("restoring"))
    before(snapshots.Snapshots, "begin", lambda *_, **__: points.pass_("staging"))
    after(snapshots.Snapshots, "begin", lambda: points.pass_("staged"))
    before(snapshots.LateVotes, "gather", lambda *_: points.pass_("voting"))
    before(snapshots.LateVotes, "broadcast", lambda *_: points.pass_("deciding"))
    before(state.State, "committed", lambda *_: points.pass_("committing"))
    assert agreement.agree is not session.agree


class Indexed(torch.utils.data.Dataset):
    """(index, x): deterministic."""

    def __init__(self, size: int) -> None:
        self.x = torch.randn(size, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, self.x[index]


def run(say: Callable[..., None], steps: int, kills: list[Kill], shard: bool = False) -> None:
    points = Points(kills, say)
    instrument(points)
    data = Indexed(27)

    @elastic.run
    def function(job: elastic.Job) -> None:
        points.pass_("entered")
        torch.manual_seed(7)
        net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        if shard:
            net[1] = nn.Identity()  # FSDP leaves buffers to each rank
        model = job.shard(net) if shard else job.replicate(net)
        first, *others = model.parameters()
        optim = SlowlySteppingAdamW([{"params": [first]}, {"params": others}], points, lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optim, 5, gamma=0.9)
        job.track(model=model, optim=optim, scheduler=scheduler)
        points.pass_("restored")
        for index, x in job.batches(data, 7, epochs=1000):
            if job.step >= steps:
                break
            points.pass_("batch")
            taken = index.tolist() if job.local_samples else []
            say(trying=job.step + 1, rank=job.rank, indices=taken, generation=job.generation)
            out = model(x)
            points.pass_("forward")
            (out - x.sin().sum(1, keepdim=True)).pow(2).mean().backward()
            points.pass_("backward")
            optim.step()
            optim.zero_grad()
            points.pass_("stepped")
            scheduler.step()
            with contextlib.ExitStack() as stack:
                stack.callback(points.pass_, "committed")
                job.commit(loss=out.detach().mean())
        tensors = {n: _whole(t) for n, t in model.state_dict().items()}
        sha256 = hashlib.sha256()
        for name in sorted(tensors):
            sha256.update(tensors[name].contiguous().numpy().tobytes())
        weights = [float(t.double().sum()) for t in tensors.values()]
        say(
            result={
                "step": job.step,
                "digest": sha256.hexdigest(),
                "weights": weights,
                "lr": optim.param_groups[0]["lr"],
            }
        )

    function()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()
