"""Plain DDP for torchrun: saves every 10 steps, loads when it starts; reports every step. No import of ours."""

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

CHECKPOINT = sys.argv[1]
PAUSE_S = 0.02

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(7)
net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
model = DistributedDataParallel(net)
optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
step = 0
if os.path.exists(CHECKPOINT):
    saved = torch.load(CHECKPOINT, weights_only=True)
    net.load_state_dict(saved["model"])
    optim.load_state_dict(saved["optim"])
    step = saved["step"]
while True:
    loss = model(torch.randn(24 // world, 16)).square().mean()
    loss.backward()
    optim.step()
    optim.zero_grad()
    step += 1
    time.sleep(PAUSE_S)
    told = {"pid": os.getpid(), "rank": rank, "step": step, "world": world, "at": time.time()}
    os.write(1, json.dumps(told).encode() + b"\n")
    if step % 10 == 0 and rank == 0:
        torch.save(
            {"model": net.state_dict(), "optim": optim.state_dict(), "step": step}, CHECKPOINT + ".new"
        )
        os.replace(CHECKPOINT + ".new", CHECKPOINT)
