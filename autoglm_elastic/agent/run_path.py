"""A worker's side of `--run-path`: what torch does in a multiprocessing child, as a command.

Torch calls its `run_script_path` there under `@record`; a command can come from the zygote and be supervised
like any other. May touch: nothing but the script it runs.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.run import run_script_path

if __name__ == "__main__":
    record(run_script_path)(*sys.argv[1:])
