"""The trainings that are measured: what a user writes. They report each step to the FIFO named in
BENCH_LOG."""
