"""An unmodified torchrun script: gloo, one all-reduce per step, no import of ours. May fail on request."""

import json
import os
import sys

import torch
import torch.distributed as dist


def report(**fields: object) -> None:
    os.write(1, json.dumps({"pid": os.getpid(), **fields}).encode() + b"\n")


restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
for step in range(int(sys.argv[1])):
    total = torch.ones(1)
    dist.all_reduce(total)
    report(rank=rank, step=step, restart=restart, sum=total.item(), world=dist.get_world_size())
    if len(sys.argv) > 2 and restart < int(sys.argv[2]) and rank == 0 and step == 3:
        raise RuntimeError(f"failing on purpose in attempt {restart}")
dist.destroy_process_group()
report(rank=rank, finished=True)
