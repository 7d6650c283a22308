"""The training of `mlp_ddp.py` with the five changed lines: workers may die, the others go on.

Every line in BENCH_LOG: wall clock in ns, "step", rank, step, generation, pid.
"""

import os
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

import autoglm_elastic as elastic

WIDTH = int(os.environ.get("BENCH_WIDTH", "2236"))
SAMPLES, SHARE, EPOCHS = 512, 8, 1_000_000


def main() -> None:
    torch.set_num_threads(1)
    log = os.open(os.environ["BENCH_LOG"], os.O_WRONLY | os.O_APPEND)
    data = TensorDataset(torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0)))
    batch = SHARE * int(os.environ["BENCH_WORKERS"])

    @elastic.run
    def train(job: elastic.Job) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        model = job.replicate(net)
        optim = torch.optim.AdamW(model.parameters(), lr=1e-4)
        job.track(model=model, optim=optim)

        for (x,) in job.batches(data, global_batch_size=batch, epochs=EPOCHS):
            loss = model(x).pow(2).mean()
            loss.backward()
            optim.step()
            optim.zero_grad()
            job.commit(loss=loss)
            line = f"{time.time_ns()} step {job.rank} {job.step} {job.generation} {os.getpid()}\n"
            os.write(log, line.encode())

    train()


if __name__ == "__main__":
    main()
