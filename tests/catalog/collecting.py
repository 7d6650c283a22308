"""Garbage collection in a process of its own, for tests: `python collecting.py RUN KILL_AT|- PASSES GRACE_S`.

Starts without torch. KILL_AT: SIGKILL to itself behind that many effects."""

from __future__ import annotations

import os
import signal
import sys
import time

from autoglm_elastic.catalog.collect import Collector
from autoglm_elastic.core.retention import Retention
from autoglm_elastic.storage import LocalBlobs

LEAVES_ONE = Retention(keep_last=1, keep_abandoned_hours=0)


def main(run: str, kill_at: str, passes: int, grace_s: float) -> None:
    left = -1 if kill_at == "-" else int(kill_at)

    def failpoint(point: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    collector = Collector(
        LocalBlobs(run), LEAVES_ONE, grace_s=grace_s, age_s=grace_s, wall=time.time, failpoint=failpoint
    )
    for _ in range(passes):
        done = collector.run()
        if done.blocked:
            raise SystemExit(done.blocked)
        os.write(1, b".")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
