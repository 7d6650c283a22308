"""Moving live state from a source rank to receivers: straight out of the source's memory, or over the group.

On one host `process_vm_readv` copies once, from the source's pages into the receiver's; anything that stands
in its way (another host, another PID namespace, a kernel that refuses) sends everything over the group
instead. The source waits until all receivers have it, because its next step would change what they read.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _broadcast_coalesced

from autoglm_elastic.training._trees import is_dense

COALESCE_BYTES: Final = 256 * 1024 * 1024
PIECE_BYTES: Final = 8 * 1024 * 1024
PIECES_MAX: Final = 128
"""Together 1 GiB: one call moves at most 2 GiB less a page, and at most 1024 pieces (UIO_MAXIOV)."""

READERS: Final = 2
"""Fresh memory costs more to fault in than to copy, and the source, which waits, leaves its core to us."""

_PR_SET_PTRACER: Final = 0x59616D61
_PR_SET_PTRACER_ANY: Final = ctypes.c_ulong(-1)


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_libc = ctypes.CDLL(None, use_errno=True)


def place() -> list[str]:
    """Names this kernel and PID namespace: equal for processes that can see each other's memory."""
    try:
        return [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            os.readlink("/proc/self/ns/pid"),
        ]
    except OSError:
        return []


def allow_reading() -> None:
    """Let the siblings read our memory where Yama restricts it to children; without Yama it does nothing."""
    _libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def describe(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Where a source's tensors lie; no addresses when they cannot be read as memory."""
    readable = all(t.device.type == "cpu" and is_dense(t) for t in tensors)
    allow_reading()
    return {
        "place": place(),
        "pid": os.getpid(),
        "ranges": [[t.data_ptr(), t.nbytes, list(t.stride())] for t in tensors] if readable else None,
    }


def read(source: dict[str, Any], tensors: Sequence[Tensor]) -> bool:
    """Fill `tensors` from the source's memory. False when that is not possible here; then they hold
    anything."""
    ranges = source["ranges"]
    if ranges is None or not source["place"] or source["place"] != place():
        return False
    lanes: list[list[tuple[int, int, int]]] = [[] for _ in range(READERS)]
    filled = [0] * READERS
    for tensor, (address, nbytes, strides) in zip(tensors, ranges, strict=True):
        same = tensor.device.type == "cpu" and is_dense(tensor) and tensor.nbytes == nbytes
        if not same or (tensor.dim() > 1 and list(tensor.stride()) != strides):
            return False
        for offset in range(0, nbytes, PIECE_BYTES):
            length = min(PIECE_BYTES, nbytes - offset)
            lane = filled.index(min(filled))
            filled[lane] += length
            lanes[lane].append((tensor.data_ptr() + offset, address + offset, length))
    with ThreadPoolExecutor(READERS) as readers:
        return all(readers.map(lambda pieces: _read_all(source["pid"], pieces), lanes))


def _read_all(pid: int, pieces: Sequence[tuple[int, int, int]]) -> bool:
    batches = range(0, len(pieces), PIECES_MAX)
    return all(_read_batch(pid, pieces[first : first + PIECES_MAX]) for first in batches)


def _read_batch(pid: int, pieces: Sequence[tuple[int, int, int]]) -> bool:
    here = (_Iovec * len(pieces))(*[_Iovec(local, length) for local, _, length in pieces])
    there = (_Iovec * len(pieces))(*[_Iovec(remote, length) for _, remote, length in pieces])
    count = ctypes.c_ulong(len(pieces))
    _libc.process_vm_readv.restype = ctypes.c_ssize_t
    moved = _libc.process_vm_readv(ctypes.c_int(pid), here, count, there, count, ctypes.c_ulong(0))
    return int(moved) == sum(length for _, _, length in pieces)


def broadcast_json(value: Any, source: int, rank: int) -> Any:
    """`value` of rank `source`, on every rank."""
    data = msgspec.json.encode(value) if rank == source else b""
    size = torch.tensor([len(data)])
    dist.broadcast(size, source)
    payload = torch.empty(int(size), dtype=torch.uint8)
    if rank == source:
        payload.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(payload, source)
    return msgspec.json.decode(payload.numpy().tobytes())


def worst(status: int) -> int:
    """The largest status of all ranks. Also a barrier."""
    worst_of_all = torch.tensor([status])
    dist.all_reduce(worst_of_all, op=dist.ReduceOp.MAX)
    return int(worst_of_all)


def broadcast(tensors: Sequence[Tensor], source: int) -> None:
    """Rank `source`'s values into everybody's `tensors`, in place."""
    by_device: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device.type, []).append(tensor.detach())
    with torch.no_grad():
        for device in sorted(by_device):
            _broadcast_coalesced(
                dist.distributed_c10d._get_default_group(), by_device[device], COALESCE_BYTES, source
            )
