"""One rank of one part, in a process of its own: `python -m autoglm_elastic.bench.checkpoint.worker SPEC RANK`.

Rank 0 says on standard output how it goes and writes the part's result beside the spec. Guarded, since DCP
starts its process by importing this module again."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import msgspec


def main() -> None:
    import torch
    import torch.distributed as dist

    from autoglm_elastic.agent import _linux
    from autoglm_elastic.bench.checkpoint import limits, loading, measure, planning, saving
    from autoglm_elastic.bench.checkpoint.spec import RESULT, Rows, Spec

    _linux.die_with_parent(int(sys.argv[3]))
    spec = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Spec)
    rank = int(sys.argv[2])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(spec.options.threads)

    def say(text: str) -> None:
        if rank == 0:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    kinds = {
        "limits": limits.measure,
        "save": saving.during_training,
        "durable": saving.standing_still,
        "memory": saving.memory_of_one,
        "load": loading.prepare if spec.role == "prepare" else loading.measure,
        "small": loading.small,
        "planning": planning.measure,
    }
    kind = spec.part.partition("-")[0]
    alone = kind in {"limits", "planning"}
    if not alone:
        measure.start_group(Path(spec.folder), rank, spec.world_size)
    rows: Rows = kinds[kind](spec, say)
    if rank == 0:
        path = Path(spec.folder) / RESULT
        path.with_suffix(".new").write_bytes(msgspec.json.encode(rows))
        path.with_suffix(".new").rename(path)
    if not alone:
        measure.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # DCP's process and threads of gloo have been seen to hold up an ordinary exit; everything is written.
    os._exit(0)


if __name__ == "__main__":
    main()
