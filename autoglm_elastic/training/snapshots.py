"""Snapshots of the running job: when they are due, their two-phase commit's votes, what came of them.

Staging happens at the agreed boundary on the training thread, everything else on the manager's threads. A snapshot that
fails is an event; training goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist

from autoglm_elastic.core.lineage import EntryFact, GenerationRecord
from autoglm_elastic.errors import CorruptSnapshot, ElasticError, UsageError
from autoglm_elastic.ports import Outcome, VotesLost
from autoglm_elastic.settings import Settings
from autoglm_elastic.training.agreement import Stored

if TYPE_CHECKING:
    from autoglm_elastic.snapshot import CheckpointManager

OURS: Final = "autoglm"
"""The key beside the tracked names in a snapshot: seed, cursors, layouts."""

PREVIOUS_LIMIT_S: Final = 60.0
"""Rank 0 begins a snapshot only after it decided the one before; the others hear of that decision at once."""

Emit = Callable[[str, dict[str, Any]], None]


class GroupVotes:
    """`ports.Votes` over a gloo group of its own."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.group: Any = None

    def gather(self, payload: bytes) -> list[bytes] | None:
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
            dist.all_gather(sizes, torch.tensor([len(payload)]), group=self.group)
            longest = max(int(size) for size in sizes)
            mine = torch.zeros(longest, dtype=torch.uint8)
            mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else mine[:0]
            received = [torch.empty_like(mine) for _ in sizes] if self.rank == 0 else None
            dist.gather(mine, received, dst=0, group=self.group)
        except Exception as error:  # what a backend raises differs from backend to backend
            raise VotesLost(str(error)) from error
        if received is None:
            return None
        return [data[: int(size)].numpy().tobytes() for data, size in zip(received, sizes, strict=True)]

    def broadcast(self, payload: bytes | None) -> bytes:
        data = payload or b""
        try:
            size = torch.tensor([len(data)])
            dist.broadcast(size, 0, group=self.group)
            tensor = torch.empty(int(size), dtype=torch.uint8)
            if self.rank == 0 and data:
                tensor.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(tensor, 0, group=self.group)
        except Exception as error:
            raise VotesLost(str(error)) from error
        return tensor.numpy().tobytes()


class Snapshots(Stored):
    """One generation's access to the run directory.

    Args:
        votes_group: builds the group for the votes; called at the first snapshot, on all ranks.
        emit: the event log.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        generation: int,
        rank: int,
        world_size: int,
        settings: Settings,
        votes_group: Callable[[], Any],
        emit: Emit,
    ) -> None:
        from autoglm_elastic.snapshot import CheckpointManager

        self.run_dir = run_dir
        self._votes = GroupVotes(rank, world_size)
        self._votes_group = votes_group
        self.manager: CheckpointManager = CheckpointManager(
            run_dir,
            generation=generation,
            votes=self._votes if world_size > 1 else None,
            rank=rank,
            world_size=world_size,
            on_event=emit,
        )
        self._rank, self._generation = rank, generation
        self._emit = emit
        self._interval_steps = settings.snapshot.interval_steps
        self._interval_s = settings.snapshot.interval_s
        self._begun_at = time.monotonic()
        self._handle: Any = None
        self._begun_step = -1
        self.committed_step = -1

    # What the agreement needs.

    def entries(self) -> list[EntryFact]:
        return [EntryFact(entry.name, entry.step, entry.generation) for entry in self.manager.entries()]

    def records(self) -> list[GenerationRecord]:
        return list(self.manager.records())

    def open(self, entry: str) -> Mapping[str, Any]:
        problems = self.manager.verify(entry)
        if problems:
            raise CorruptSnapshot(str(problems[0]))
        state: dict[str, Any] = {OURS: {}}
        self.manager.load(state, entry=entry, strict=False)
        ours = state[OURS]
        if not isinstance(ours, dict) or not {"job", "layouts"} <= set(ours):
            raise CorruptSnapshot(f"snapshot {entry} was not written by elastic.run")
        return ours

    def put_generation(self, record: GenerationRecord) -> Outcome:
        return self.manager.put_generation(record)

    def reject(self, entry: str, reason: str) -> None:
        self._emit("snapshot.rejected", {"entry": entry, "reason": reason})

    # What the running job needs.

    def loader(self, entry: str) -> Callable[[dict[str, Any]], None]:
        def load(state: dict[str, Any]) -> None:
            report = self.manager.load(state, entry=entry, strict=False)
            if report.missing:
                raise UsageError(f"snapshot {entry} has no {', '.join(report.missing[:5])}")

        return load

    def due(self, boundary: int) -> bool:
        """Rank 0's decision; the others follow it. Never while one is under way."""
        if self._rank != 0 or self.busy:
            return False
        by_steps = self._interval_steps > 0 and boundary % self._interval_steps == 0
        by_time = self._interval_s > 0 and time.monotonic() - self._begun_at >= self._interval_s
        return by_steps or by_time

    @property
    def newest_begun(self) -> int:
        """The step of the newest snapshot begun here, -1 for none."""
        return self._begun_step

    @property
    def busy(self) -> bool:
        self.collect()
        return self._handle is not None

    def begin(self, step: int, state: dict[str, Any], metrics: Mapping[str, Any]) -> Any:
        """Stage the state of this boundary; all ranks call it at the same one. None when it could not even begin."""
        self._begun_at = time.monotonic()
        try:
            if self._votes.world_size > 1 and self._votes.group is None:
                self._votes.group = self._votes_group()
            if self._handle is not None:
                self._handle.wait(PREVIOUS_LIMIT_S)
                self.collect()
            self._handle = self.manager.save(step, state, metrics=dict(metrics), agreed=True)
            self._begun_step = step
        except (ElasticError, OSError, RuntimeError) as error:
            self._emit("snapshot.failed", self._failure(step, str(error)))
            return None
        return self._handle

    def wait(self, limit_s: float) -> bool:
        """True when the newest snapshot begun here is committed."""
        if self._handle is not None:
            self._handle.wait(limit_s)
        self.collect()
        return self._handle is None and self._begun_step >= 0 and self.committed_step == self._begun_step

    def collect(self) -> None:
        """Note what became of the snapshot under way, if it is decided."""
        handle = self._handle
        if handle is None or not handle.done():
            return
        self._handle = None
        if handle.wait(0).committed:
            self.committed_step = self._begun_step

    def close(self) -> None:
        self.manager.close()

    def _failure(self, step: int, reason: str) -> dict[str, Any]:
        return {"step": step, "generation": self._generation, "rank": self._rank, "reason": reason}
