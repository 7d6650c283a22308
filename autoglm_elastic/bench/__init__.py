"""Benchmarks that a user can run: each compares with torchrun, or with torch's own checkpoints, in one go on
the same work and names the machine.

May touch: processes that it starts itself, by pid. Must never: reach into a room; it sees what a user of the
two launchers sees, and what it measures is what the training scripts in `scripts/` report.
"""
