"""What is to be measured: the options of a run, and the parts it consists of."""

from __future__ import annotations

from typing import Final

import msgspec

from autoglm_elastic.errors import UsageError

Measures = dict[str, list[float]]
"""Samples of one row by measure; the unit is the end of the measure's name (`stall_s`, `peak_bytes`)."""
Rows = dict[str, Measures]
"""One part's result by row."""

RESULT: Final = "result.json"
"""Of rank 0, in its folder."""
QUICK_MIB: Final = 24
QUICK_REPEAT: Final = 2
LOAD_CASES: Final = ("2-1", "2-3", "1-2", "2-2", "replicated")
"""Ranks that saved, ranks that load, of a sharded state; the last: two ranks load the whole state each."""

PARTS: Final = {
    "limits": "limits of the machine",
    "save-replicated": "snapshots during training, replicated state",
    "durable-replicated": "snapshots of a training that stands still, replicated state",
    "memory-replicated": "memory of a snapshot, replicated state",
    "save-sharded": "snapshots during training, FSDP2-sharded state",
    "durable-sharded": "snapshots of a training that stands still, FSDP2-sharded state",
    "memory-sharded": "memory of a snapshot, FSDP2-sharded state",
    **{f"load-{case}": f"load, {case.replace('-', ' → ') if '-' in case else case}" for case in LOAD_CASES},
    "small": "many small tensors",
    "planning": "planning without input or output",
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Of one run.

    Args:
        mib: size of the state, in MiB: parameters, both moments of AdamW, step counters.
        repeat: measured rounds; one more before them warms up and is thrown away.
        tensors: how many small ones, and how many in planning.
        worlds: simulated ranks in planning.
        case_s: bound of one measurement in planning; what would take longer is extrapolated.
        threads: of torch in each rank, as torchrun sets it.
        disk: False in memory (tmpfs), where nothing is cold and nothing goes past the page cache.
    """

    mib: int = 1024
    repeat: int = 5
    tensors: int = 10_000
    worlds: tuple[int, ...] = (64, 1024)
    case_s: float = 40.0
    threads: int = 1
    quick: bool = False
    disk: bool = True


QUICK: Final = Options(mib=QUICK_MIB, repeat=QUICK_REPEAT, tensors=200, worlds=(4, 8), case_s=5.0, quick=True)


def options(*, quick: bool = False, mib: int | None = None, repeat: int | None = None) -> Options:
    """Full size, or that of a smoke run, changed as given. Raises UsageError."""
    for name, value in (("--mib", mib), ("--repeat", repeat)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}", valid="1 or more")
    base = QUICK if quick else Options()
    return msgspec.structs.replace(base, mib=mib or base.mib, repeat=repeat or base.repeat)


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranks of one start are told. `folder` is theirs; `share` lies beside it and outlives them."""

    part: str
    role: str
    """`measure`; or `prepare`: what a later start loads. In `memory-*`: the contender."""
    folder: str
    share: str
    world_size: int
    mark: str
    options: Options


def chosen(names: list[str] | None) -> list[str]:
    """All parts, or those named; a name stands for every part that begins with it. Raises UsageError."""
    for name in names or ():
        if not any(part.startswith(name) for part in PARTS):
            raise UsageError(
                f"part {name!r}", valid=", ".join(PARTS), do="name some of these, or none for all"
            )
    return [part for part in PARTS if not names or any(part.startswith(name) for name in names)]
