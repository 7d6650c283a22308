"""What planning a snapshot costs as the world grows. Worlds of doubling size are measured as long as the next
fits into memory and time; what does not is the straight line through the two largest that did, and is called
extrapolated."""

from __future__ import annotations

import gc
import statistics
from typing import Final

import psutil

from autoglm_elastic.bench.checkpoint.measure import now
from autoglm_elastic.bench.checkpoint.planners import PLANNERS, Planner, sharded_state, simulated
from autoglm_elastic.bench.checkpoint.saving import Say, add
from autoglm_elastic.bench.checkpoint.spec import Options, Rows, Spec

WORLD_FIRST: Final = 4
MEMORY_FRACTION_MAX: Final = 0.5
"""Of what is free: the simulated ranks all live in this process."""
SETUP_FACTOR: Final = 3
"""Making the simulated ranks' parts takes about so much longer than merging them."""


def measure(spec: Spec, say: Say) -> Rows:
    """`local_W_s`: the slowest of three ranks; `merge_W_s`; `merge_W_extrapolated_s` where it was not measured."""
    rows: Rows = {}
    tensors = spec.options.tensors
    for name, planner in PLANNERS.items():
        measured: dict[int, float] = {}
        world = WORLD_FIRST
        while world <= max(spec.options.worlds):
            if not _fits(planner, tensors, world, measured, spec.options.case_s):
                break
            samples = _merge_s(planner, tensors, world, spec.options)
            measured[world] = statistics.median(samples)
            say(f"{name}: {tensors} tensors of {world} ranks merged in {measured[world]:.2f} s")
            for sample in samples:
                add(rows, name, **{f"merge_{world}_s": sample})
            world *= 2
        for wanted in spec.options.worlds:
            for sample in _local_s(planner, tensors, wanted, spec.options.repeat):
                add(rows, name, **{f"local_{wanted}_s": sample})
            if wanted not in measured:
                add(rows, name, **{f"merge_{wanted}_extrapolated_s": extrapolated(measured, wanted)})
        add(rows, name, largest_measured_ranks=float(max(measured)))
    return rows


def extrapolated(measured: dict[int, float], world: int) -> float:
    """The straight line through the two largest worlds that were measured."""
    (low, low_s), (high, high_s) = sorted(measured.items())[-2:]
    return high_s + (high_s - low_s) / (high - low) * (world - high)


def _fits(planner: Planner, tensors: int, world: int, measured: dict[int, float], case_s: float) -> bool:
    if len(measured) < 2:
        return True
    free = psutil.virtual_memory().available * MEMORY_FRACTION_MAX
    return (
        tensors * world * planner.item_bytes <= free
        and extrapolated(measured, world) * SETUP_FACTOR <= case_s
    )


def _merge_s(planner: Planner, tensors: int, world: int, options: Options) -> list[float]:
    with simulated(0, world) as mesh:
        first = planner.local(sharded_state(tensors, mesh), 0, world)
    samples: list[float] = []
    parts = planner.all_locals(first, world)
    repeat = options.repeat
    begun = now()
    for _ in range(repeat + 1):
        gc.collect()
        begin = now()
        planner.merged(parts)
        samples.append(now() - begin)
        if now() - begun > options.case_s / SETUP_FACTOR:
            break
    return samples[1:] or samples


def _local_s(planner: Planner, tensors: int, world: int, repeat: int) -> list[float]:
    """Of three ranks the slowest, the first time thrown away."""
    slowest = [0.0] * repeat
    for rank in (0, world // 2, world - 1):
        with simulated(rank, world) as mesh:
            state = sharded_state(tensors, mesh)
            for number in range(-1, repeat):
                gc.collect()
                begin = now()
                planner.local(state, rank, world)
                took = now() - begin
                if number >= 0:
                    slowest[number] = max(slowest[number], took)
    return slowest
