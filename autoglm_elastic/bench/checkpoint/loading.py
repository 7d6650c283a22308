"""Loading what another world saved: cold and warm, ours verified, the others as they are; every loaded value
is checked afterwards, outside of the measured time."""

from __future__ import annotations

from mmap import PAGESIZE as PAGE
from pathlib import Path
from typing import Final

import torch.distributed as dist

from autoglm_elastic.bench.checkpoint import raw, shards
from autoglm_elastic.bench.checkpoint.contenders import LOADERS, SMALL_SAVERS
from autoglm_elastic.bench.checkpoint.measure import barrier, now, slowest
from autoglm_elastic.bench.checkpoint.saving import Say, Turns, add, turn
from autoglm_elastic.bench.checkpoint.spec import Rows, Spec
from autoglm_elastic.bench.checkpoint.training import State, local, tensors_of
from autoglm_elastic.errors import PlatformError

_NUMBER: Final = 1
_RAW: Final = "raw"
SMALL_BYTES: Final = 4096


def prepare(spec: Spec, say: Say) -> Rows:
    """One snapshot of each contender, and a plain file of the same size, below `share`."""
    state = shards.layers(spec.options.mib, sharded=spec.part != "load-replicated")
    shards.fill(state)
    turns = Turns(LOADERS.values(), Path(spec.share), None)
    for name, saver in turns.savers.items():
        saver.save(_NUMBER, state).durable_at()
        barrier()
        say(f"{name}: saved by {spec.world_size} ranks")
    if dist.get_rank() == 0:
        memory = raw.warm_memory(sum(t.numel() * t.element_size() for t in tensors_of(state).values()))
        raw.fill(memory, 0)
        (Path(spec.share) / _RAW).mkdir()
        raw.write(Path(spec.share) / _RAW, memory, files=1, direct=False)
    barrier()
    turns.close()
    return {}


def measure(spec: Spec, say: Say) -> Rows:
    """Seconds from all ranks' call to the last rank's return; memory of the targets is there before."""
    rows: Rows = {}
    share = Path(spec.share)
    state = shards.layers(spec.options.mib, sharded=spec.part != "load-replicated")
    turns = Turns(LOADERS.values(), share, None)
    held = sum(local(t).numel() * local(t).element_size() for t in tensors_of(state).values())
    reads = _Reads(share / _RAW / "raw0", held, sharded=spec.part != "load-replicated")
    names = [*turns.savers, *reads.names]
    for round_ in range(-1, spec.options.repeat):
        for cold in (True, False) if spec.options.disk else (False,):
            for name in turns.order(names, max(round_, 0)):
                if not cold and "direct" in name:
                    continue
                folder = share / (name if name in turns.savers else _RAW)
                _set_temperature(folder, cold=cold)
                took = _load(turns, name, state) if name in turns.savers else reads.measure(name)
                if round_ >= 0:
                    add(rows, name, **{"cold_s" if cold else "warm_s": took})
                say(f"{turn(round_)}: {name}, {'cold' if cold else 'warm'}, {took:.3f} s")
    (most,) = slowest(float(held))
    add(rows, "ours", rank_bytes=most)
    turns.close()
    return rows


def _set_temperature(folder: Path, *, cold: bool) -> None:
    barrier()
    if dist.get_rank() == 0:
        cached = raw.make_cold(folder) if cold else raw.make_warm(folder)
        if cold and cached > raw.COLD_FRACTION_MAX:
            raise PlatformError(
                f"{cached:.0%} of {folder.name} stays in the page cache, so nothing cold can be measured"
            )
    barrier()


def _load(turns: Turns, name: str, state: State, salt: int = 0, number: int = _NUMBER) -> float:
    shards.clear(state)
    barrier()
    begin = now()
    turns.savers[name].load(number, state)
    (took,) = slowest(now() - begin)
    if wrong := shards.wrong(state, salt):
        raise PlatformError(f"{name} loaded other values than were saved: {wrong[:3]}")
    return took


class _Reads:
    """The limit: as many bytes as this rank loads, read by every rank at once into memory that is there;
    of a sharded state each rank reads other bytes."""

    def __init__(self, file: Path, nbytes: int, *, sharded: bool) -> None:
        self._file = file
        self._memory = raw.warm_memory(nbytes)
        room = file.stat().st_size - self._memory.numel()
        self._offset = min(room, dist.get_rank() * self._memory.numel()) // PAGE * PAGE if sharded else 0
        self._ways = {
            f"read-{'direct' if direct else 'cache'}-{threads}": (threads, direct)
            for direct in (False, True)
            for threads in raw.FILES
        }
        self.names = list(self._ways)

    def measure(self, name: str) -> float:
        threads, direct = self._ways[name]
        barrier()
        begin = now()
        raw.read(self._file, self._memory, threads=threads, direct=direct, offset=self._offset)
        (took,) = slowest(now() - begin)
        return took


def small(spec: Spec, say: Say) -> Rows:
    """Many small tensors: saved, loaded cold and warm, by two ranks that hold all of them."""
    rows: Rows = {}
    state = shards.small(spec.options.tensors, SMALL_BYTES)
    turns = Turns(SMALL_SAVERS.values(), Path(spec.folder), None)
    names = list(turns.savers)
    for round_ in range(-1, spec.options.repeat):
        for name in turns.order(names, max(round_, 0)):
            saver, number = turns.savers[name], turns.next_number()
            shards.fill(state, number)
            barrier()
            trigger = now()
            pending = saver.save(number, state)
            stall = now() - trigger
            stall, durable = slowest(stall, pending.durable_at() - trigger)
            took = {"stall_s": stall, "save_s": durable}
            for cold in (True, False) if spec.options.disk else (False,):
                _set_temperature(saver.folder, cold=cold)
                took["cold_s" if cold else "warm_s"] = _load(turns, name, state, number, number)
            if round_ >= 0:
                add(rows, name, **took)
            say(f"{turn(round_)}: {name}, save {durable:.2f} s, load {took['warm_s']:.2f} s")
        turns.tidy()
    turns.close()
    return rows
