"""Kill → next new step at full world, with this folder's harness in place of an agent. Not a test: run it by
hand.

python tests/training/measure_recovery.py 10
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from harness import Cluster, Zygote


def main(kills: int) -> None:
    zygote = Zygote()
    totals = []
    with tempfile.TemporaryDirectory() as folder, Cluster(zygote, Path(folder), "mlp") as cluster:
        cluster.start(2)
        for kill in range(1, kills + 1):
            for worker in cluster.alive:
                cluster.wait(lambda w=worker: sum("committed" in s for s in w.said[-5:]) > 3, "steps")
            victim = cluster.alive[kill % 2]
            began = time.time()
            cluster.kill(victim)
            killed = time.time()
            cluster.reform(add=1)
            forked = time.time()
            first = [cluster.wait_said(worker, generation=kill) for worker in cluster.alive]
            totals.append(max(said["at"] for said in first) - began)
            print(
                f"kill {kill}: {totals[-1] * 1e3:.0f} ms; death seen {(killed - began) * 1e3:.0f},", end=" "
            )
            print(f"worlds sent and forked {(forked - killed) * 1e3:.0f}")

            for worker, said in zip(cluster.alive, first, strict=True):
                phases = cluster.resumed(kill)
                mine = next(r for r in worker.told if r in phases)
                text = ", ".join(f"{name} {s * 1e3:.0f}" for name, s in mine.phases_s.items())
                usual = statistics.median(s["took"] for s in worker.said if "took" in s)
                print(f"   rank {worker.rank}: step {said['committed']}: {text} (a step: {usual * 1e3:.0f})")
    zygote.close()
    median, worst = statistics.median(totals) * 1e3, max(totals) * 1e3
    print(f"median {median:.0f} ms, worst {worst:.0f} ms over {len(totals)} kills")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
