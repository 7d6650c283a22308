"""Train a small byte-level GPT on Python's own sources, on workers that may die.

    autoglm-run --nproc-per-node=4 --run-dir=/tmp/gpt -m autoglm_elastic.examples.gpt --steps 200
    python -m autoglm_elastic.examples.gpt --steps 50

Kill a worker while it runs: the others keep their process and go on. Interrupt it and give the first command
again: it resumes. `ddp.py` beside it is the same training for plain torchrun.
"""

import torch

import autoglm_elastic as elastic
from autoglm_elastic.examples._gpt import GPT, arguments, evaluate, split, write_result


def main() -> None:
    args = arguments("A small GPT on Python's own sources, elastic.")
    torch.set_num_threads(1)  # the workers share the cores of this machine
    training, held_out = split(args.seq_len)  # does not depend on the world: survivors of an incident keep it

    @elastic.run  # entered again, in the same process, when the world changes
    def train(job: elastic.Job) -> None:
        torch.manual_seed(args.seed)
        model = job.replicate(GPT(args.layers, args.width, args.seq_len))
        optim = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
        job.track(model=model, optim=optim)

        for windows in job.batches(training, global_batch_size=args.global_batch_size, epochs=args.epochs):
            if job.step >= args.steps:
                break
            loss = model(windows)  # a mean over this worker's share; the job weights shares by their size
            loss.backward()
            optim.step()
            optim.zero_grad()
            job.commit(loss=loss)  # the step boundary: counted, eligible for snapshots

        if job.rank == 0:
            write_result(args.out, step=job.step, loss=evaluate(model, held_out), model=model)

    train()


if __name__ == "__main__":
    main()
