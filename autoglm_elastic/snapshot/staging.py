"""One rank's snapshots on their way from the state to a writer: the layout and the memory that are used again,
the copy, and what is handed over.

May touch the state only by reading it. Must never raise in the training thread what is a snapshot's failure,
except from `Stager.begin`, whose caller turns it into a vote."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog.decide import Request
from autoglm_elastic.catalog.failpoints import Failpoints
from autoglm_elastic.catalog.prepared import Wish
from autoglm_elastic.core.commit import Verdict
from autoglm_elastic.errors import ElasticError, PlatformError
from autoglm_elastic.keeper import InProcess, Keeper, Pending, Segment, WriteJob
from autoglm_elastic.snapshot._memory import MemorySource
from autoglm_elastic.snapshot.copy import ChangedEarly, Copy, can_guard
from autoglm_elastic.snapshot.cuda import Pinned
from autoglm_elastic.snapshot.layout import Layout, Taken
from autoglm_elastic.snapshot.line import Line
from autoglm_elastic.snapshot.pauses import collection_paused
from autoglm_elastic.snapshot.stage import Images

COPY_S: Final = 60.0
"""How long anybody waits for a copy of memory: what takes longer hangs."""
_IDLE_S: Final = 60.0
"""The copying thread looks up this often although it is woken for everything."""


class Staging:
    """One snapshot's part of this rank. Any thread may use it."""

    def __init__(
        self,
        request: Request,
        wish: Wish | None,
        taken: Taken,
        images: Images,
        segment: Segment,
        copy: Copy,
        keeper: Keeper | InProcess,
    ) -> None:
        self.snapshot, self.copy = request.snapshot, copy
        self.digest = taken.layout.digest
        self.failed: ElasticError | None = None
        self._wish, self._layout, self._values = wish, taken.layout, taken.values
        self._images, self._segment, self._keeper = images, segment, keeper
        self._lock = threading.Lock()
        self._given_up = False
        self._handed = threading.Event()
        self._pending: Pending | None = None

    def structure(self) -> fmt.Structure:
        return self._layout.structure(self._values)

    def copied(self, timeout_s: float) -> bool:
        """True when nothing reads the state any more, or what is put on the current stream runs behind it."""
        return self.copy.release(timeout_s)

    def hand_over(self) -> None:
        """Waits for the copy and gives it to the writer. Never raises."""
        try:
            self.copy.wait(COPY_S)
            self._images.write_heads(self._segment)
            vote = fmt.encode(fmt.Prepared(packs=(), structure=self.digest, cover=self._images.cover))
            details = self._layout.details(self._values, self._wish)
            job = WriteJob(self.snapshot, self._segment.number, self._images.packs, vote, details)
            with self._lock:
                if not self._given_up:
                    self._pending = self._keeper.write(job)
        except ElasticError as error:
            self.failed = error
        except Exception as error:  # noqa: BLE001 - a bug in here is the snapshot's failure, not the training's
            self.failed = PlatformError(f"staging: {type(error).__name__}: {error}")
        finally:
            if self._pending is None:
                self._keeper.give_back(self._segment)
            self._handed.set()

    def prepared(self, timeout_s: float) -> fmt.Prepared:
        """This rank's vote, when its packs are durable. Raises ElasticError."""
        if not self._handed.wait(timeout_s):
            raise PlatformError(f"staging did not end within {timeout_s:.0f} s")
        if self.failed is not None:
            raise self.failed
        if self._pending is None:
            raise PlatformError("the snapshot was given up while it was staged")
        packs = self._pending.wait(timeout_s)
        return fmt.Prepared(
            packs=packs, structure=self.digest, cover=self._images.cover, since=self._pending.since
        )

    def give_up(self, reason: str) -> None:
        """Nothing of this snapshot is written any more that was not begun."""
        self.copy.give_up(reason)
        with self._lock:
            self._given_up = True

    def settled(self, verdict: Verdict) -> None:
        """The decision as far as it is known here: the memory is free when nobody reads it any more."""
        self.give_up("it is decided")
        self._keeper.settled(self.snapshot, verdict)


@dataclass(slots=True)
class _Deferred:
    """Which tensors of a layout belong to which optimizers, as long as the memory is the same."""

    optimizers: list[int]
    pointers: list[int]
    numbers: frozenset[int]


class Stager:
    """Begins snapshots; keeps what the next one can use. `begin` is for one thread."""

    def __init__(self, line: Line, rank: int, world_size: int, failpoint: Failpoints) -> None:
        self._rank, self._world_size = rank, world_size
        self._memory = MemorySource(line.open, line.known)
        self._failpoint = failpoint
        self._layout: Layout | None = None
        self._images = Images(())
        self._deferred: _Deferred | None = None
        self._pinned = Pinned()
        self._on_device = False
        self._late = True
        """Copying late has never failed."""
        self._copying: list[Staging] = []
        self._queue: queue.SimpleQueue[Staging | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(
        self,
        request: Request,
        state: Mapping[str, Any],
        optimizers: Sequence[Optimizer] = (),
        *,
        patient: bool = False,
    ) -> Staging:
        """When this returns, only what belongs to `optimizers` may still be copied: it must not change before
        `wait_copied`. Raises ElasticError, and whatever the state's own objects raise."""
        with torch.no_grad():
            taken = self._layout.take(state) if self._layout is not None else None
            if taken is None:
                taken = self._lay_out(state)
            keeper, segment = self._memory.get(max(1, self._images.nbytes), patient=patient)
            try:
                copy = self._copy(taken, segment, optimizers)
            except BaseException:
                keeper.give_back(segment)
                raise
        wish = Wish.of(request) if self._rank == 0 else None
        staging = Staging(request, wish, taken, self._images, segment, copy, keeper)
        self._copying = [one for one in self._copying if one.copy.reads]
        if copy.reads:
            self._copying.append(staging)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="autoglm-snapshot-copy", daemon=True)
            self._thread.start()
        self._queue.put(staging)
        return staging

    def _lay_out(self, state: Mapping[str, Any]) -> Taken:
        self._deferred = None
        self._layout = None
        with collection_paused():
            layout = Layout(state, self._rank, self._world_size)
            self._images = Images(layout.parts)
        self._layout = layout
        taken = layout.first()
        self._on_device = any(tensor.is_cuda for tensor in taken.local)
        return taken

    def _copy(self, taken: Taken, segment: Segment, optimizers: Sequence[Optimizer]) -> Copy:
        local = taken.local
        if self._on_device:
            self._pinned.pin(segment)
        sources = [
            part.of(local[part.source]) if part.cuts else local[part.source] for part in self._images.parts
        ]
        pairs = list(zip(self._images.views(segment), sources, strict=True))
        late = self._belonging(taken, optimizers) if optimizers and self._late else frozenset()
        if not late:
            return Copy(pairs, (), ())
        numbers = [part.source in late for part in self._images.parts]
        now = [pair for pair, is_late in zip(pairs, numbers, strict=True) if not is_late]
        later = [pair for pair, is_late in zip(pairs, numbers, strict=True) if is_late]
        guarded = [taken.tensors[number] for number in late]
        if any(isinstance(tensor, DTensor) for tensor in guarded):
            # A DTensor's alias counts what is done to the other as a whole, not what is done to its local part.
            guarded += [tensor for tensor in _owned(optimizers) if can_guard(tensor)]
        return Copy(now, later, guarded)

    def _belonging(self, taken: Taken, optimizers: Sequence[Optimizer]) -> frozenset[int]:
        """Numbers of the tensors that only a step of `optimizers` changes."""
        identities = list(map(id, optimizers))
        known = self._deferred
        if known is None or known.optimizers != identities or known.pointers != taken.pointers:
            theirs = _places(optimizers)
            numbers = frozenset(
                number
                for number, place in enumerate(zip(taken.pointers, taken.local, strict=True))
                if (place[0], place[1].nbytes) in theirs and can_guard(taken.tensors[number])
            )
            known = self._deferred = _Deferred(identities, taken.pointers, numbers)
        return known.numbers

    def wait_copied(self) -> None:
        """Returns when the state may change: everything is copied, or given up after COPY_S. Never raises."""
        copying, self._copying = self._copying, []
        for staging in copying:
            if not staging.copied(COPY_S):
                staging.give_up(f"the copy did not end within {COPY_S:.0f} s")

    def _work(self) -> None:
        while True:
            try:
                staging = self._queue.get(timeout=_IDLE_S)
            except queue.Empty:
                continue
            if staging is None:
                return
            staging.copy.help()
            self._failpoint("staged")
            staging.hand_over()
            if isinstance(staging.failed, ChangedEarly):
                self._late = False

    def close(self, reason: str) -> None:
        for staging in self._copying:
            staging.give_up(reason)
        self._queue.put(None)

    def free(self) -> None:
        """No snapshot is in flight and none will be."""
        self._layout, self._images = None, Images(())
        self._pinned.release()


def _places(optimizers: Sequence[Optimizer]) -> set[tuple[int, int]]:
    """(address, bytes) where `_owned` lies."""
    local = (one._local_tensor if isinstance(one, DTensor) else one for one in _owned(optimizers))
    return {(one.data_ptr(), one.nbytes) for one in local if one.layout is torch.strided and one.numel()}


def _owned(optimizers: Sequence[Optimizer]) -> list[torch.Tensor]:
    """The parameters of optimizers and what they keep for each of them."""
    tensors: list[torch.Tensor] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            tensors.extend(group["params"])
        for entry in optimizer.state.values():
            if isinstance(entry, Mapping):
                tensors.extend(value for value in entry.values() if isinstance(value, torch.Tensor))
    return tensors
