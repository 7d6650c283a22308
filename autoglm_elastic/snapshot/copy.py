"""Copying tensors into staged memory: some at once, the rest while training goes on, until somebody is about to
change them.

The rest is copied in pieces by a thread and, when training has to wait for it, by the training thread too. The
interpreter's lock is not held during a piece. What is copied late must not change before: the versions that
torch counts are compared, and samples of what the host copies, so that an early change is an error and not a
torn snapshot."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Final

import torch
from torch.distributed.tensor import DTensor

from autoglm_elastic.errors import ElasticError, PlatformError, UsageError
from autoglm_elastic.snapshot.cuda import DeviceCopies
from autoglm_elastic.snapshot.samples import Samples

PIECE_BYTES: Final = 64 << 20
"""Copied in one call: a few milliseconds, after which a copy can be given up."""
PIECE_TENSORS: Final = 4096

_version = attrgetter("_version")

Pair = tuple[torch.Tensor, torch.Tensor]
"""(where to, from)."""


class ChangedEarly(UsageError):
    """Something other than an optimizer's step changed what was copied late."""


class Copy:
    """One snapshot's copy.

    Args:
        now: copied when this returns.
        later: copied by `help`.
        guarded: tensors that share the memory which `later` reads and nobody may change meanwhile.
    """

    def __init__(self, now: Sequence[Pair], later: Sequence[Pair], guarded: Iterable[torch.Tensor]) -> None:
        self._guarded = _guard(guarded) if later else []
        self._lock = threading.Lock()
        now_host, now_device = _split(now)
        later_host, later_device = _split(later)
        self._samples = Samples([pair[1] for pair in later_host])
        self._devices = [DeviceCopies(pairs) for pairs in (now_device, later_device) if pairs]
        if now_device:
            self._devices[0].order()
        self._pieces: deque[list[Pair]] = deque(_pieces(later_host))
        self._unfinished = len(self._pieces)
        self._done = threading.Event()
        """Of what the host copies."""
        self._error: ElasticError | None = None
        for piece in _pieces(now_host):
            _copy(piece)
        if not self._unfinished:
            self._done.set()

    @property
    def reads(self) -> bool:
        """Somebody may still have to wait before the state changes."""
        return bool(self._guarded) or not self._done.is_set()

    def help(self) -> None:
        """Copies pieces until none is left to begin. From any thread. Never raises."""
        while True:
            with self._lock:
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
            try:
                _copy(piece)
            except Exception as error:  # noqa: BLE001 - the snapshot's failure, not the training's
                self._fail(PlatformError(f"staging: {type(error).__name__}: {error}"))
            with self._lock:
                self._unfinished -= 1
                if self._unfinished:
                    continue
            self._finish()

    def release(self, timeout_s: float) -> bool:
        """For the thread that is about to change the state: when this returns True, the host has copied what
        it will, and the current streams run behind what devices copy."""
        self.help()
        if not self._done.wait(timeout_s):
            return False
        for device in self._devices:
            device.order()
        self._check()
        return True

    def wait(self, timeout_s: float) -> None:
        """Until everything is copied. Raises ElasticError when it is not, or not what was there at first."""
        if not self._done.wait(timeout_s):
            self.give_up(f"the copy did not end within {timeout_s:.0f} s")
        try:
            for device in self._devices:
                device.synchronize()
        except RuntimeError as error:
            self._fail(PlatformError(f"staging: {error}"))
        self._check()
        if self._error is not None:
            raise self._error

    def give_up(self, reason: str) -> None:
        """Begins no more pieces; `wait` raises. Does nothing when everything was copied."""
        with self._lock:
            dropped = len(self._pieces)
            self._pieces.clear()
            self._unfinished -= dropped
            last = dropped and not self._unfinished
        if dropped or not self._done.is_set():
            self._fail(PlatformError(reason))
        if last:
            self._done.set()

    def _finish(self) -> None:
        if not self._devices:
            self._check()
        self._done.set()

    def _check(self) -> None:
        """Once, before anybody may change what was copied."""
        with self._lock:
            counted = sum(tensor._version != version for tensor, version in self._guarded)
            self._guarded = []
            if (self._samples.changed() or counted) and self._error is None:
                self._error = ChangedEarly(
                    f"{counted or 'some'} tensors changed while they were copied, before an optimizer's step",
                    do="call Handle.wait_staged first, or leave their optimizer out; "
                    "from now on everything is copied at once",
                )

    def _fail(self, error: ElasticError) -> None:
        with self._lock:
            self._error = self._error or error


def _split(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """(read by the host, read by a device)."""
    device = [pair for pair in pairs if pair[1].is_cuda]
    return ([pair for pair in pairs if not pair[1].is_cuda] if device else list(pairs)), device


def can_guard(tensor: torch.Tensor) -> bool:
    """Torch counts the versions of `tensor`."""
    return not tensor.is_inference()


def _guard(tensors: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
    every = []
    for tensor in tensors:
        every.append(tensor)
        if isinstance(tensor, DTensor):
            every.append(tensor._local_tensor)
    return list(zip(every, map(_version, every), strict=True))


def _pieces(pairs: Sequence[Pair]) -> Iterable[list[Pair]]:
    piece: list[Pair] = []
    nbytes = 0
    for pair in pairs:
        piece.append(pair)
        nbytes += pair[0].nbytes
        if nbytes >= PIECE_BYTES or len(piece) >= PIECE_TENSORS:
            yield piece
            piece, nbytes = [], 0
    if piece:
        yield piece


def _copy(piece: list[Pair]) -> None:
    with torch.no_grad():
        torch._foreach_copy_([pair[0] for pair in piece], [pair[1] for pair in piece])
