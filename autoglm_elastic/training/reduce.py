"""Gradients of replicated modules: the mean over the global batch, on every rank.

In place of DistributedDataParallel, because a rank's share counts by its samples, a module must be adopted
without being wrapped again, a rank may have no sample, and the step's control numbers travel along. Follows
DDP (Li et al., "PyTorch Distributed", VLDB 2020): buckets in reverse order of registration, reduced while
backward still runs, `p.grad` a view into its bucket, a repeated backward accumulates, buffers are those of
rank 0.

May touch: `.grad` of the module's parameters and its floating-point buffers. Must never: count a step whose
reduction failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoglm_elastic.training._trees import is_dense
from autoglm_elastic.training.outcomes import MisuseError
from autoglm_elastic.training.steps import SLOTS

BUCKET_BYTES: Final = 25 * 1024 * 1024
"""DDP's: large enough for bandwidth, small enough to overlap with backward."""

FIRST_BUCKET_BYTES: Final = 1024 * 1024


class BufferPool:
    """Flat gradient memory that survives a change of world: a new reducer finds it warm."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.dtype, torch.device, int], list[Tensor]] = {}

    def take(self, dtype: torch.dtype, device: torch.device, numel: int) -> Tensor:
        free = self._free.get((dtype, device, numel))
        return free.pop() if free else torch.empty(numel, dtype=dtype, device=device)

    def keep_only(self, flats: Sequence[Tensor]) -> None:
        """Everything free becomes exactly `flats`: what nobody took in the last generation is let go."""
        self._free.clear()
        for flat in flats:
            self._free.setdefault((flat.dtype, flat.device, flat.numel()), []).append(flat)


@dataclass(slots=True)
class _Bucket:
    flat: Tensor
    parameters: list[nn.Parameter]
    views: list[Tensor]
    ready: int = 0
    work: Any = None


@dataclass(slots=True)
class _Tail:
    """Rides behind the gradients of the last bucket: control numbers, which parameters were used, float
    buffers."""

    flat: Tensor
    used: list[float] = field(default_factory=list)
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(buffer, its place in `flat`)"""


class Reducer:
    """Reduces the gradients of one module while attached.

    Args:
        module: its parameters that require a gradient are reduced; floating-point buffers up to float32
            follow rank 0.
        rank, world_size: of the default group.
        weight: this rank's share of the current global batch; the shares of all ranks sum to 1.
        slots, arrived: the step's control numbers, see `steps.StepControl`.
        on_failure: called with the error of a failed collective; must raise.
        pool: where flat buffers come from.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        rank: int,
        world_size: int,
        weight: Callable[[], float],
        slots: Callable[[], Sequence[float]],
        arrived: Callable[[Sequence[float]], None],
        on_failure: Callable[[BaseException], None],
        pool: BufferPool,
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._weight, self._slots, self._arrived, self._on_failure = weight, slots, arrived, on_failure
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        if not self._parameters:
            raise MisuseError("job.replicate: the module has no parameter that requires a gradient")
        buffers = [b for b in module.buffers() if b.is_floating_point() and b.dtype != torch.float64]
        self._buckets, self._tail = _lay_out(self._parameters, buffers, pool)
        self._place = {p: (b, i) for b in self._buckets for i, p in enumerate(b.parameters)}
        self._index = {p: i for i, p in enumerate(self._parameters)}
        self._control_with_us = self._tail.flat.device.type == "cpu"
        self._launched = 0
        self._seen: set[nn.Parameter] = set()
        self._share = 0.0
        self.running = False
        """Between the first gradient of a backward and the end of it."""
        self.enabled = True
        """False inside `job.accumulate()`: gradients only add up locally."""
        self._handles = [
            p.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
            for p in self._parameters
        ]

    @property
    def flats(self) -> list[Tensor]:
        return [bucket.flat for bucket in self._buckets]

    def detach(self) -> None:
        """Off the module. Gradients that are views into our buffers are dropped."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters:
            parameter.grad = None

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self.enabled:
            return
        if not self.running:
            self._start()
        if parameter in self._seen:
            raise MisuseError(
                "a parameter got its gradient twice in one backward",
                valid="one gradient per parameter and backward: checkpoint(…, use_reentrant=False)",
            )
        self._seen.add(parameter)
        bucket, index = self._place[parameter]
        self._fill(bucket, index)
        bucket.ready += 1
        while self._launched < len(self._buckets) - 1:
            waiting = self._buckets[self._launched]
            if waiting.ready < len(waiting.parameters):
                break
            self._launch(waiting)

    def _start(self) -> None:
        self.running = True
        self._launched = 0
        self._seen.clear()
        self._share = self._weight()
        for bucket in self._buckets:
            bucket.ready, bucket.work = 0, None
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _fill(self, bucket: _Bucket, index: int) -> None:
        """This rank's weighted gradient into its place; `p.grad` becomes the place."""
        parameter, view = bucket.parameters[index], bucket.views[index]
        gradient = parameter.grad
        with torch.no_grad():
            if gradient is None or self._share == 0.0:
                view.zero_()
            elif gradient.is_sparse:
                raise MisuseError("sparse gradients cannot be reduced", do="use sparse=False")
            elif gradient.data_ptr() == view.data_ptr():
                view.mul_(self._share)
            else:
                torch.mul(gradient, self._share, out=view)
            if gradient is not None:
                parameter.grad = view

    def _launch(self, bucket: _Bucket) -> None:
        try:
            bucket.work = dist.all_reduce(bucket.flat, async_op=True)
        except Exception as error:  # noqa: BLE001  (what a backend raises differs from backend to backend)
            self._on_failure(error)
        self._launched += 1

    def _finish(self) -> None:
        unused = []
        for bucket in self._buckets[self._launched :]:
            for index, parameter in enumerate(bucket.parameters):
                if parameter not in self._seen:
                    if parameter.grad is None:
                        unused.append(parameter)
                    self._fill(bucket, index)
        self._fill_tail(unused)
        while self._launched < len(self._buckets):
            self._launch(self._buckets[self._launched])
        try:
            for bucket in self._buckets:
                bucket.work.wait()
        except Exception as error:  # noqa: BLE001
            self._on_failure(error)
        self._read_tail(unused)
        self.running = False

    def _fill_tail(self, unused: list[nn.Parameter]) -> None:
        tail = self._tail
        used = [1.0 if self._share else 0.0] * len(self._parameters)
        for parameter in unused:
            used[self._index[parameter]] = 0.0
        slots = list(self._slots()) if self._control_with_us else [0.0] * SLOTS
        head = torch.tensor(slots + used, dtype=torch.float32)
        with torch.no_grad():
            tail.flat[: head.numel()].copy_(head, non_blocking=True)
            for buffer, place in tail.buffers:
                if self._rank == 0:
                    place.copy_(buffer)
                else:
                    place.zero_()

    def _read_tail(self, unused: list[nn.Parameter]) -> None:
        tail = self._tail
        if self._control_with_us:
            self._arrived(tail.flat[:SLOTS].tolist())
        if unused:
            used = tail.flat[SLOTS : SLOTS + len(self._parameters)].tolist()
            for parameter in unused:
                if used[self._index[parameter]] > 0:
                    bucket, index = self._place[parameter]
                    parameter.grad = bucket.views[index]
        if self._rank != 0:
            with torch.no_grad():
                for buffer, place in tail.buffers:
                    buffer.copy_(place)


def _lay_out(
    parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor], pool: BufferPool
) -> tuple[list[_Bucket], _Tail]:
    """Buckets of one dtype and device each, in the order in which backward fills them; the tail behind the
    last."""
    groups: list[list[nn.Parameter]] = []
    nbytes, limit = 0, FIRST_BUCKET_BYTES
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        last = groups[-1][0] if groups else None
        alike = last is not None and (last.dtype, last.device) == (parameter.dtype, parameter.device)
        if not alike or nbytes + size > limit:
            if groups:
                limit = BUCKET_BYTES
            groups.append([])
            nbytes = 0
        groups[-1].append(parameter)
        nbytes += size
    tail_numel = SLOTS + len(parameters) + sum(buffer.numel() for buffer in buffers)
    if groups[-1][0].dtype != torch.float32:
        groups.append([])
    buckets = []
    for group in groups:
        last_group = group is groups[-1]
        like = group[0] if group else parameters[0]
        dtype = like.dtype if group else torch.float32
        numel = sum(parameter.numel() for parameter in group) + (tail_numel if last_group else 0)
        flat = pool.take(dtype, like.device, numel)
        views, offset = [], 0
        for parameter in group:
            views.append(_view(flat, offset, parameter))
            offset += parameter.numel()
        buckets.append(_Bucket(flat, group, views))
    tail = _Tail(buckets[-1].flat[-tail_numel:])
    offset = SLOTS + len(parameters)
    for buffer in buffers:
        place = tail.flat[offset : offset + buffer.numel()].view(buffer.shape)
        tail.buffers.append((buffer, place))
        offset += buffer.numel()
    return buckets, tail


def _view(flat: Tensor, offset: int, parameter: nn.Parameter) -> Tensor:
    """A piece of `flat` with the parameter's shape and, where it is dense, its strides (as autograd wants
    them)."""
    piece = flat[offset : offset + parameter.numel()]
    if is_dense(parameter):
        return piece.as_strided(parameter.shape, parameter.stride(), piece.storage_offset())
    return piece.view(parameter.shape)
