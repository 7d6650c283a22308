"""The tracked state of a job in this process, from one generation to the next.

Survivors adopt their live tensors, receivers get everything from the plan's source, everybody loads from a
snapshot, or nobody restores anything, as the plan says. Knows which step the state is at and whether it is
whole: a state that an optimizer has begun to change, or that has not been received completely, is no source
for others.

May touch: the tracked objects. Must never: decide what to resume from (core/recovery.py does).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoglm_elastic.core.recovery import Plan
from autoglm_elastic.training import move
from autoglm_elastic.training.init_skip import SkippedInitialization
from autoglm_elastic.training.outcomes import MisuseError, StateMismatch
from autoglm_elastic.training.reshard import reshard
from autoglm_elastic.training.tracked import (
    Layout,
    Tracked,
    TrackedModule,
    TrackedOptimizer,
    tensors_in,
    wrap,
)

_READY: Final = 0
_NEEDS_BROADCAST: Final = 1
_DOES_NOT_FIT: Final = 2

Loader = Callable[[dict[str, Any]], None]
"""Fills a nested dict of tensors in place from the plan's snapshot."""


class State:
    """One per process.

    Attributes:
        step: committed steps; the state is that of this boundary unless `dirty`.
        generation: the one in which `step` was committed, -1 before the first.
        followed: the one whose plan was entered last, -1 before the first.
        dirty: an optimizer has stepped since.
    """

    def __init__(self) -> None:
        self.step = 0
        self.generation = self.followed = -1
        self.dirty = False
        self._objects: dict[str, Tracked] = {}
        self._live: dict[str, Tracked] = {}
        self._plan: Plan | None = None
        self._rank, self._world_size = 0, 1
        self._holders: Sequence[int] = ()
        self._awaited: frozenset[str] = frozenset()
        self._layouts: Mapping[str, Layout] = {}
        self._load: Loader | None = None
        self._skip = SkippedInitialization()
        self._committed_here = False
        self._stepped: list[str] = []

    # One generation.

    def begin(
        self,
        plan: Plan,
        rank: int,
        world_size: int,
        *,
        names: frozenset[str],
        holders: Sequence[int],
        layouts: Mapping[str, Layout],
        load: Loader | None,
        generation: int,
    ) -> None:
        """Enter generation `generation`, that resumes by `plan`.

        Args:
            names: what the source of a live state tracks.
            holders: for a sharded live state the rank that holds shard 0, 1, …
            layouts, load: for a state from disk: its layouts by name, and how to read it.
        """
        self._plan, self._rank, self._world_size = plan, rank, world_size
        self._holders = holders
        self._layouts, self._load = layouts, load
        self._live, self._objects = self._objects, {}
        receives = plan.tier == "live" and (rank in plan.receivers or bool(holders))
        if plan.tier != "live":
            self._live = {n: t for n, t in self._live.items() if plan.tier == "disk" and not t.sharded}
        self._awaited = names if receives else frozenset(layouts)
        self.step, self.generation = (
            max(plan.step, 0),
            generation if plan.tier == "fresh" else plan.generation,
        )
        self.followed = generation
        self.dirty = self._committed_here = False
        self._stepped.clear()
        if plan.tier != "fresh":
            self._skip = SkippedInitialization()
            self._skip.start()

    def leave(self) -> None:
        """Out of the user's function: hooks off, what an abandoned step changed rolled back where that is
        possible."""
        self.settle()
        if any(isinstance(t, TrackedModule) and t.changed_outside() for t in self._objects.values()):
            self.dirty = True
        for tracked in self._objects.values():
            tracked.release()
            if not self.dirty:
                tracked.roll_back()
        self._objects = {**self._live, **self._objects}
        self._live = {}

    def settle(self) -> None:
        """Everything that will be tracked at the start is: initialisation is real again."""
        self._skip.stop(self._restored_parameters())

    @property
    def holds(self) -> bool:
        """Whether this process holds a whole state of `step`, from which others could resume.

        Before the first commit nobody knows whether all is tracked that will be; and nothing is lost by a new
        beginning.
        """
        return self.step > 0 and bool(self._objects) and not self.dirty and not self._awaited

    @property
    def names(self) -> list[str]:
        return list(self._objects)

    @property
    def sharded(self) -> bool:
        return any(tracked.sharded for tracked in self._objects.values())

    @property
    def optimizers(self) -> list[Optimizer]:
        return [tracked.target for tracked in self._objects.values() if isinstance(tracked, TrackedOptimizer)]

    def tracks(self, target: Any) -> bool:
        return any(tracked.target is target for tracked in self._objects.values())

    def stepping(self, optimizer: str) -> None:
        """An optimizer begins to change the state; until the commit it is no state of any step."""
        self.dirty = True
        self._stepped.append(optimizer)

    @property
    def torn(self) -> str:
        """Why the state that was left is no source for anybody, "" when it is one."""
        if not self.dirty:
            return ""
        begun = f"step {self.step + 1} was half made"
        if not self._stepped:
            return (
                f"{begun}: a parameter without an optimizer was changed, and an error came before job.commit"
            )
        others = [n for n, t in self._objects.items() if isinstance(t, TrackedOptimizer)]
        others = [name for name in others if name not in self._stepped]
        done = f"{begun}: {', '.join(map(repr, dict.fromkeys(self._stepped)))} had stepped"
        if others:
            return f"{done}, {', '.join(map(repr, others))} had not"
        return f"{done}, and an error came before job.commit"

    def committed(self, generation: int) -> None:
        """A step boundary: the state is whole again, of one step more."""
        self.step += 1
        self.generation = generation
        self.dirty = False
        self._stepped.clear()
        self._committed_here = True
        self._live = {}
        for tracked in self._objects.values():
            tracked.shadow()

    # Tracking.

    def track(
        self, objects: Mapping[str, Any], *, synchronized: Callable[[nn.Module], bool], alone: bool
    ) -> None:
        """Track and restore. All ranks call it with the same names in the same order.

        Args:
            synchronized: whether a module's initial values are the same on all ranks already.
            alone: a world of one: nothing is sent to anybody.
        """
        plan = self._plan
        if plan is None:
            raise MisuseError("job.track was called outside of elastic.run's function")
        if self._committed_here and plan.tier != "fresh":
            raise MisuseError(
                f"job.track({', '.join(objects)}) after a commit", do="track everything before the first step"
            )
        new = self._wrap(objects)
        if plan.tier == "fresh":
            fresh = [t for t in new.values() if isinstance(t, TrackedModule) and not synchronized(t.target)]
            if not alone and fresh:
                move.broadcast([x for t in fresh if not t.sharded for x in t.capture()[1]], 0)
        elif self._holders:
            self._reshard(new)
        elif plan.tier == "live":
            for name, tracked in new.items():
                if name in self._live:
                    tracked.adopt(self._live[name])
            if plan.receivers and not alone:
                self._receive(new, plan)
            elif missing := [name for name in new if name not in self._live]:
                self._complain_missing(missing)
        else:
            self._load_from_disk(new)
        self._awaited -= frozenset(new)
        if plan.tier != "fresh" and not self._awaited:
            self.settle()
        if plan.tier != "fresh":
            for tracked in self._objects.values():
                if isinstance(tracked, TrackedOptimizer):
                    tracked.roll_back()
        for tracked in new.values():
            tracked.shadow()

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Layout]]:
        """(the state as a nested dict of tensors, for people and other tools: name → tensors by their own names;
        JSON from which a process that has none of the tensors can prepare them)."""
        captured = {name: tracked.capture() for name, tracked in self._objects.items()}
        state = {name: _by_name(*one) for name, one in captured.items()}
        return state, {name: layout for name, (layout, _) in captured.items()}

    def _wrap(self, objects: Mapping[str, Any]) -> dict[str, Tracked]:
        known: dict[Tensor, str] = {}
        modules = {n: t.target for n, t in self._objects.items() if isinstance(t, TrackedModule)}
        modules |= {n: target for n, target in objects.items() if isinstance(target, nn.Module)}
        for name, module in modules.items():
            for parameter_name, parameter in module.named_parameters():
                known.setdefault(parameter, f"{name}.{parameter_name}")
        for name in objects:
            if name in self._objects:
                raise MisuseError(f"job.track({name}=…): the name is taken", valid="one object for each name")
        new = {
            name: wrap(name, target, known, partial(self.stepping, name)) for name, target in objects.items()
        }
        self._objects.update(new)
        return new

    def _receive(self, new: Mapping[str, Tracked], plan: Plan) -> None:
        """The source describes its state, receivers fetch it; everybody waits until they have it."""
        source = plan.source_rank or 0
        captured = {name: tracked.capture() for name, tracked in new.items()} if self._rank == source else {}
        mine = [tensor for _, tensors in captured.values() for tensor in tensors]
        offer = None
        if self._rank == source:
            layouts = {name: layout for name, (layout, _) in captured.items()}
            offer = {"layouts": layouts, "memory": move.describe(mine)}
        offer = move.broadcast_json(offer, source, self._rank)
        status, problem, targets = _READY, None, {}
        if self._rank in plan.receivers:
            try:
                targets = _prepare(new, offer["layouts"])
            except StateMismatch as error:
                status, problem = _DOES_NOT_FIT, error
            mine = [tensor for tensors in targets.values() for tensor in tensors]
            if problem is None and not move.read(offer["memory"], mine):
                status = _NEEDS_BROADCAST
        elif self._rank != source:
            mine = [tensor for tracked in new.values() for tensor in tracked.capture()[1]]
        status = move.worst(status)
        if status == _DOES_NOT_FIT:
            raise problem or StateMismatch("another rank tracks something that does not fit the live state")
        if status == _NEEDS_BROADCAST:
            move.broadcast(mine, source)
        for name, tensors in targets.items():
            new[name].finish(offer["layouts"][name], tensors)

    def _reshard(self, new: Mapping[str, Tracked]) -> None:
        """Live shards of a world that nobody was lost from, into this one."""
        source = self._holders[0]
        old = {name: self._live[name].capture() for name in new if name in self._live}
        if len(old) < len(new) and self._rank in self._holders:
            self._complain_missing([name for name in new if name not in old])
        layouts = {name: layout for name, (layout, _) in old.items()}
        layouts = move.broadcast_json(layouts, source, self._rank)
        targets = _prepare(new, layouts)
        mine = [tensor for name in new for tensor in old[name][1]] if old else None
        with torch.no_grad():
            flat = [tensor for tensors in targets.values() for tensor in tensors]
            reshard(flat, mine, self._holders, self._rank, self._world_size)
        for name, tensors in targets.items():
            new[name].finish(layouts[name], tensors)

    def _load_from_disk(self, new: Mapping[str, Tracked]) -> None:
        missing = [name for name in new if name not in self._layouts]
        if missing or self._load is None:
            self._complain_missing(missing)
            return
        for name, tracked in new.items():
            if name in self._live:
                tracked.adopt(self._live[name])
        targets = _prepare(new, self._layouts)
        self._load({name: _by_name(self._layouts[name], tensors) for name, tensors in targets.items()})
        for name, tensors in targets.items():
            new[name].finish(self._layouts[name], tensors)

    def _complain_missing(self, missing: list[str]) -> None:
        raise StateMismatch(
            f"job.track: the state of step {self.step} has no {', '.join(map(repr, missing))}",
            do="track the same names every time the function is entered",
        )

    def _restored_parameters(self) -> list[Tensor]:
        modules = [t.target for t in self._objects.values() if isinstance(t, TrackedModule)]
        return [parameter for module in modules for parameter in module.parameters()]


def _prepare(new: Mapping[str, Tracked], layouts: Mapping[str, Layout]) -> dict[str, list[Tensor]]:
    missing = [name for name in new if name not in layouts]
    if missing:
        raise StateMismatch(f"job.track: the state has no {', '.join(map(repr, missing))}")
    with torch.no_grad():
        return {name: tracked.prepare(layouts[name]) for name, tracked in new.items()}


def _by_name(layout: Layout, tensors: list[Tensor]) -> dict[str, Any]:
    """Tensors under the names that people know: parameters by name, optimizer state by parameter and key."""
    body = layout["body"]
    if layout["kind"] == "module":
        return dict(zip(body, tensors, strict=True))
    if layout["kind"] == "optimizer":
        places = _optimizer_places(body)
        return {places.get(index, f"other.{index}"): tensor for index, tensor in enumerate(tensors)}
    return {str(index): tensor for index, tensor in enumerate(tensors)}


def _optimizer_places(body: Mapping[str, Any]) -> dict[int, str]:
    """Index of a tensor in an optimizer's layout → where it stands, as a dotted name."""
    owners = [(f"state.{name}", entry) for name, entry in body["state"].items()]
    owners += [(f"param_groups.{group}", hyper) for group, hyper in enumerate(body["hyper"])]
    return {index: f"{owner}.{key}" for owner, entry in owners for key, index in tensors_in(entry)}
