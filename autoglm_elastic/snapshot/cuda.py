"""Copies from CUDA devices: on a stream of their own, ordered behind the work that the state comes from, into
memory that the device can reach by itself.

Nobody on the host waits for them except whoever hands the bytes on; the training's stream waits where the state
is changed next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autoglm_elastic.errors import PlatformError
from autoglm_elastic.keeper import Segment


class DeviceCopies:
    """Copies under way from CUDA devices to the host. Made on the training thread.

    Args:
        pairs: (where to, from); the sources are kept until `synchronize`.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._kept: list[torch.Tensor] = []
        self._done: list[Any] = []
        by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for pair in pairs:
            by_device.setdefault(pair[1].device, []).append(pair)
        for device, group in by_device.items():
            stream = _side_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.no_grad(), torch.cuda.stream(stream):
                sources = [pair[1] for pair in group]
                torch._foreach_copy_([pair[0] for pair in group], sources, non_blocking=True)
                self._done.append(stream.record_event())
            self._kept.extend(sources)

    def order(self) -> None:
        """What is put on the current streams from now on runs behind the copies."""
        for event in self._done:
            torch.cuda.current_stream(event.device).wait_event(event)

    def synchronize(self) -> None:
        """The host has the bytes. Raises RuntimeError."""
        for event in self._done:
            event.synchronize()
        self._kept.clear()


_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


class Pinned:
    """Host memory that is registered with CUDA, so that devices copy into it by themselves."""

    def __init__(self) -> None:
        self._registered: dict[Segment, torch.Tensor] = {}

    def pin(self, segment: Segment) -> None:
        """Once for each. Raises PlatformError."""
        if segment in self._registered:
            return
        whole = torch.frombuffer(segment.memory, dtype=torch.uint8)
        code = torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, 0)  # type: ignore[no-untyped-call]
        if int(code) != 0:
            raise PlatformError(
                f"pinning {whole.nbytes} bytes: CUDA error {int(code)}",
                do="raise the limit of locked memory (ulimit -l)",
            )
        self._registered[segment] = whole

    def release(self) -> None:
        """All of it. No copy may be under way."""
        while self._registered:
            _, whole = self._registered.popitem()
            torch.cuda.cudart().cudaHostUnregister(whole.data_ptr())  # type: ignore[no-untyped-call]
