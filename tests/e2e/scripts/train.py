"""The five-line version of a small training; reports each step it is about to commit, and a digest of the result."""

import argparse
import contextlib
import hashlib
import json
import os
import socket
import time

import torch

import autoglm_elastic as elastic

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--hidden", type=int, default=64)
parser.add_argument("--pause-s", type=float, default=0.0)
parser.add_argument("--stuck-rank", type=int, default=-1)
parser.add_argument("--stuck-step", type=int, default=-1)
parser.add_argument("--exit-rank", type=int, default=-1)
parser.add_argument("--exit-step", type=int, default=-1)
parser.add_argument("--reset-step", type=int, default=-1, help="rank 0 loses all its connections, and lives")
parser.add_argument("--raise-step", type=int, default=-1)
parser.add_argument("--snapshot-every", type=int, default=0)
parser.add_argument("--once", default="")
parser.add_argument("--linger", default="", help="a fifo to read a byte from, after the training")
parser.add_argument("--shard", action="store_true")
options = parser.parse_args()


def report(**fields: object) -> None:
    os.write(1, json.dumps({"pid": os.getpid(), **fields}).encode() + b"\n")


def once() -> bool:
    """True for the first process that asks, in this run."""
    try:
        os.close(os.open(options.once, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def reset_connections() -> None:
    """As a middlebox does: both ends live, and neither can reach the other any more."""
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as one:
            if one.family == socket.AF_INET and one.getpeername():
                one.shutdown(socket.SHUT_RDWR)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return options.steps * 24

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(16, generator=torch.Generator().manual_seed(index))


@elastic.run
def train(job: elastic.Job) -> None:
    torch.manual_seed(7)
    net = torch.nn.Sequential(
        torch.nn.Linear(16, options.hidden), torch.nn.Tanh(), torch.nn.Linear(options.hidden, 1)
    )
    model = job.shard(net) if options.shard else job.replicate(net)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    job.track(model=model, optim=optim)
    report(rank=job.rank, entered=job.step, world=job.world)
    for batch in job.batches(Rows(), global_batch_size=24):
        loss = model(batch).square().mean()
        if job.step == options.exit_step and job.rank == options.exit_rank and once():
            raise SystemExit(0)
        if job.step == options.reset_step and job.rank == 0 and once():
            reset_connections()
        if job.step == options.raise_step:
            raise ValueError("the user's own mistake")
        if job.step == options.stuck_step and job.rank == options.stuck_rank and once():
            report(rank=job.rank, stuck=job.step)
            os.read(os.pipe()[0], 1)  # blocks in C for good: no exception can be raised here
        loss.backward()
        optim.step()
        optim.zero_grad()
        time.sleep(options.pause_s)
        report(
            rank=job.rank, step=job.step + 1, world=job.world
        )  # commit may not return: it can end this world
        if options.snapshot_every and (job.step + 1) % options.snapshot_every == 0:
            snapshot = job.snapshot()
            job.commit(loss=loss)
            snapshot.wait(30)
        else:
            job.commit(loss=loss)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(full.detach().contiguous().numpy().tobytes())
    report(rank=job.rank, digest=digest.hexdigest(), final=job.step)


if options.linger:
    report(started=True)
train()
if options.linger:
    with open(options.linger, "rb", buffering=0) as fifo:
        fifo.read(1)
