"""A 10M-parameter MLP in plain PyTorch: DDP, torch.save every 10 steps, load on restart. For torchrun.

Every line in BENCH_LOG: wall clock in ns, "joined" (after the first collective) or "step", rank, step,
restart, pid.
"""

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

WIDTH = int(os.environ.get("BENCH_WIDTH", "2236"))
SAMPLES, SHARE, SAVE_EVERY = 512, 8, 10


def main() -> None:
    torch.set_num_threads(1)
    log = os.open(os.environ["BENCH_LOG"], os.O_WRONLY | os.O_APPEND)
    checkpoint = os.path.join(os.environ["BENCH_DIR"], "checkpoint.pt")
    restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
    data = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0))

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    def note(what: str, step: int) -> None:
        os.write(log, f"{time.time_ns()} {what} {rank} {step} {restart} {os.getpid()}\n".encode())

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    model = DistributedDataParallel(net)
    note("joined", 0)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step = 0
    if os.path.exists(checkpoint):
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["model"])
        optim.load_state_dict(saved["optim"])
        step = saved["step"]

    while True:
        start = (step * world + rank) * SHARE % SAMPLES
        loss = model(data[start : start + SHARE]).pow(2).mean()
        loss.backward()
        optim.step()
        optim.zero_grad()
        step += 1
        note("step", step)
        if step % SAVE_EVERY == 0 and rank == 0:
            torch.save(
                {"model": net.state_dict(), "optim": optim.state_dict(), "step": step}, checkpoint + ".new"
            )
            os.replace(checkpoint + ".new", checkpoint)


if __name__ == "__main__":
    main()
