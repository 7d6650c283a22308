"""`python -m autoglm_elastic.keeper`: becomes the keeper of a run directory on this node, unless there is one.

Started by `client`, which waits until this process says "ready" on a pipe or closes it. Leaves its parent,
session and directory at once; what it imports, it imports afterwards."""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> None:
    """PATH URL SETTINGS FD: the socket's name, the run directory, settings.Keeper as JSON, the pipe."""
    path, url, settings, pipe = arguments
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    from autoglm_elastic.keeper.process import run

    code = 1
    try:
        run(path, url, settings, int(pipe))
        code = 0
    finally:
        os._exit(code)  # threads that hang in a system call must not keep a process that has nothing to do


if __name__ == "__main__":
    main(sys.argv[1:])
