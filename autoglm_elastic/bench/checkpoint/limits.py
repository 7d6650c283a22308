"""What this machine can do, whatever the engine: one process, the bytes of the whole state."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from autoglm_elastic.bench.checkpoint import raw
from autoglm_elastic.bench.checkpoint.measure import now
from autoglm_elastic.bench.checkpoint.saving import Say, add, turn
from autoglm_elastic.bench.checkpoint.spec import Rows, Spec
from autoglm_elastic.errors import PlatformError

_FILE: Final = "raw0"


def measure(spec: Spec, say: Say) -> Rows:
    """Seconds for `mib`; the rows take turns."""
    rows: Rows = {}
    folder = Path(spec.folder)
    memory = raw.warm_memory(spec.options.mib << 20)
    other = raw.warm_memory(spec.options.mib << 20)
    source = folder / "source"
    source.mkdir()
    raw.fill(memory, 0)
    raw.write(source, memory, files=1, direct=False)
    file = source / _FILE

    def write(files: int, direct: bool) -> Callable[[], None]:
        return lambda: raw.write(folder / "target", memory, files=files, direct=direct)

    def read(threads: int, direct: bool) -> Callable[[], None]:
        return lambda: raw.read(file, other, threads=threads, direct=direct)

    tasks: dict[str, Callable[[], object]] = {"memcpy": lambda: other.copy_(memory)}
    for files in raw.FILES:
        tasks[f"write-cache-{files}"] = write(files, False)
        tasks[f"read-warm-cache-{files}"] = read(files, False)
        if spec.options.disk:
            tasks[f"write-direct-{files}"] = write(files, True)
            tasks[f"read-cold-cache-{files}"] = read(files, False)
            tasks[f"read-cold-direct-{files}"] = read(files, True)
    tasks["sha256-1"] = lambda: raw.sha256(memory, 1)
    tasks["sha256-2"] = lambda: raw.sha256(memory, 2)
    tasks["xxh3"] = lambda: raw.xxh3(memory)

    for round_ in range(-1, spec.options.repeat):
        for name, task in tasks.items():
            _prepare(name, folder, source)
            begin = now()
            task()
            took = now() - begin
            if name.startswith("write"):
                shutil.rmtree(folder / "target")
            if round_ >= 0:
                add(rows, name, seconds_s=took)
            say(f"{turn(round_)}: {name}, {took:.3f} s")
    add(rows, "memcpy", state_bytes=memory.numel())
    return rows


def _prepare(name: str, folder: Path, source: Path) -> None:
    if name.startswith("write"):
        (folder / "target").mkdir()
    elif name.startswith("read-cold"):
        left = raw.make_cold(source)
        if left > raw.COLD_FRACTION_MAX:
            raise PlatformError(
                f"{left:.0%} of a file stays in the page cache, so nothing cold can be measured"
            )
    elif name.startswith("read-warm"):
        raw.make_warm(source)
