"""Train a small byte-level GPT on Python's own sources: plain PyTorch, nothing of AutoGLM Elastic.

    torchrun --standalone --nproc-per-node=4 -m autoglm_elastic.examples.ddp --steps 200

`autoglm-run` starts it as it is, too. `gpt.py` beside it is the same training with the five changed lines.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from autoglm_elastic.examples._gpt import GPT, arguments, evaluate, split, write_result


def main() -> None:
    args = arguments("A small GPT on Python's own sources, for torchrun.")
    torch.set_num_threads(1)  # the workers share the cores of this machine
    training, held_out = split(args.seq_len)

    def train() -> None:
        dist.init_process_group("gloo")
        torch.manual_seed(args.seed)
        model = DistributedDataParallel(GPT(args.layers, args.width, args.seq_len))
        optim = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
        sampler: DistributedSampler[Tensor] = DistributedSampler(training, seed=args.seed)
        step = 0

        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            share = args.global_batch_size // dist.get_world_size()
            for windows in DataLoader(training, batch_size=share, sampler=sampler):
                if step >= args.steps:
                    break
                loss = model(windows)
                loss.backward()
                optim.step()
                optim.zero_grad()
                step += 1

        if dist.get_rank() == 0:
            write_result(args.out, step=step, loss=evaluate(model.module, held_out), model=model.module)
        dist.destroy_process_group()

    train()


if __name__ == "__main__":
    main()
