"""Random streams of Python, NumPy and torch as a pure function of (seed of the job, step, rank).

Derived anew at every step boundary, so that a step that is redone, or done after a resume, draws what it
would have drawn. May touch: the global generators of this process and nothing else.
"""

from __future__ import annotations

import hashlib
import random
import struct

import numpy as np
import torch


def derive(*numbers: int) -> int:
    """64 well-mixed bits from integers, the same on every machine."""
    packed = struct.pack(f"<{len(numbers)}Q", *(number & 0xFFFF_FFFF_FFFF_FFFF for number in numbers))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set the global generators to the stream of `rank` in the step after `step` committed ones.

    Not by `torch.manual_seed`, which formats a stack trace for every kind of device that is not in use.
    """
    value = derive(seed, step, rank)
    random.seed(value)
    np.random.seed([value & 0xFFFF_FFFF, value >> 32])
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(value)
