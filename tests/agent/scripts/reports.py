"""Answers on the descriptor it was given, says who it is on its streams, and ends as it is told."""

import os
import sys

rank, restart = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
print(f"rank {rank} restart {restart}")
print(f"error {rank}", file=sys.stderr)
if "REPORT_FD" in os.environ:
    fd = int(os.environ["REPORT_FD"])
    os.write(fd, f"rank {rank}".encode())
    if os.read(fd, 64) == b"fail":
        sys.exit(5)
