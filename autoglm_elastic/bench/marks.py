"""Finding every process that a benchmark's job started, also those that have left its process tree: each inherits a
mark in its environment."""

from __future__ import annotations

from typing import Final

import psutil

MARK: Final = "AUTOGLM_BENCH_JOB"


def marked(mark: str) -> list[psutil.Process]:
    """All living processes with this value of MARK."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found
