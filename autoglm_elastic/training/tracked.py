"""What a job can track: modules, optimizers, and anything with `state_dict()` and `load_state_dict()`.

Each is seen as JSON (`layout`) plus tensors in a fixed order, so that one mover and one snapshot format serve
all. `adopt` takes the live tensors of a predecessor without copying. What a step changes other than through
an optimizer (buffers, schedulers) is kept as it was at the last commit and can be rolled back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from autoglm_elastic.training import _trees
from autoglm_elastic.training.outcomes import StateMismatch

BUFFER_BYTES_SMALL: Final = 1 << 20
"""Buffers up to this size are copied at every commit. A larger one (a mask, a table) only if its version says
that it changed; batch normalisation does not say so, but its buffers are small."""

Layout = dict[str, Any]
"""{"kind", "body", "specs"}: everything but the bytes of the tensors."""


class Tracked:
    """One tracked object under its name."""

    kind = ""

    def __init__(self, name: str, target: Any) -> None:
        self.name = name
        self.target = target

    @property
    def sharded(self) -> bool:
        return False

    def capture(self) -> tuple[Layout, list[Tensor]]:
        """The state now. The tensors are the live ones."""
        raise NotImplementedError

    def prepare(self, layout: Layout) -> list[Tensor]:
        """Tensors to be filled from a state of this layout. Raises StateMismatch when it does not fit."""
        raise NotImplementedError

    def finish(self, layout: Layout, tensors: list[Tensor]) -> None:
        """`prepare`'s tensors are filled: make them the state."""

    def adopt(self, old: Tracked) -> None:
        """Take over the live state of a predecessor, without a copy. Raises StateMismatch."""
        raise NotImplementedError

    def shadow(self) -> None:
        """Remember what a step may change before an optimizer steps."""

    def roll_back(self) -> None:
        """Back to the last `shadow`."""

    def release(self) -> None:
        """Hooks off the target."""

    def _check(self, layout: Layout) -> None:
        if layout["kind"] != self.kind:
            raise StateMismatch(
                f"{self.name!r} is tracked as {self.kind}, but its state is that of a {layout['kind']}",
                do="track the same things under the same names as before",
            )


class TrackedModule(Tracked):
    """Parameters and persistent buffers; those that are not persistent are adopted where they fit."""

    kind = "module"
    target: nn.Module

    def __init__(self, name: str, target: nn.Module) -> None:
        super().__init__(name, target)
        self._shadows: dict[str, tuple[int, Tensor]] = {}
        self._versions: list[tuple[dict[str, Any], str, int]] = []
        self._buffers = _places(target, "_buffers")
        self._parameters = _places(target, "_parameters")

    @property
    def sharded(self) -> bool:
        return any(isinstance(parameter, DTensor) for parameter in self.target.parameters())

    def state(self) -> dict[str, Tensor]:
        """Name → live tensor; a tied parameter once, under its first name."""
        found: dict[str, Tensor] = dict(self.target.named_parameters())
        for prefix, module in self.target.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    found[f"{prefix}.{name}" if prefix else name] = buffer
        return found

    def capture(self) -> tuple[Layout, list[Tensor]]:
        state = self.state()
        tensors = [tensor.detach() for tensor in state.values()]
        return {"kind": self.kind, "body": list(state), "specs": [_trees.spec(t) for t in tensors]}, tensors

    def prepare(self, layout: Layout) -> list[Tensor]:
        self._check(layout)
        state = self.state()
        stored = dict(zip(layout["body"], layout["specs"], strict=True))
        self._compare(state, {name: (tuple(made[1]), _trees.dtype_of(made)) for name, made in stored.items()})
        return [state[name].detach() for name in layout["body"]]

    def adopt(self, old: Tracked) -> None:
        if not isinstance(old, TrackedModule):
            raise StateMismatch(f"{self.name!r} was tracked as {old.kind}, now as {self.kind}")
        if old.target is not self.target:
            mine, live = self.state(), old.state()
            self._compare(mine, {name: (tuple(t.shape), t.dtype) for name, t in live.items()})
            with torch.no_grad():
                for name, tensor in mine.items():
                    tensor.data = live[name].data
                leftovers = dict(old.target.named_buffers())
                for name, buffer in self.target.named_buffers():
                    other = leftovers.get(name)
                    if name not in mine and other is not None and other.shape == buffer.shape:
                        buffer.data = other.data
        self._shadows = old._shadows

    def shadow(self) -> None:
        now, kept = [], []
        for name, owner, key in self._buffers:
            buffer = owner[key]
            known = self._shadows.get(name)
            if buffer is None:
                continue
            if known is None or known[1].shape != buffer.shape:
                self._shadows[name] = (buffer._version, buffer.detach().clone())
            elif buffer.nbytes <= BUFFER_BYTES_SMALL or known[0] != buffer._version:
                self._shadows[name] = (buffer._version, known[1])
                now.append(buffer.detach())
                kept.append(known[1])
        if now:
            torch._foreach_copy_(kept, now)
        self._versions = [
            (owner, key, parameter._version)
            for _, owner, key in self._parameters
            if (parameter := owner[key]) is not None and not parameter.requires_grad
        ]

    def roll_back(self) -> None:
        now, kept = [], []
        for name, owner, key in self._buffers:
            buffer = owner[key]
            known = self._shadows.get(name)
            if buffer is not None and known is not None and known[1].shape == buffer.shape:
                now.append(buffer.detach())
                kept.append(known[1])
        if now:
            torch._foreach_copy_(now, kept)

    def changed_outside(self) -> bool:
        """A parameter that no optimizer owns (a moving average, say) was changed since the last `shadow`."""
        return any(
            owner[key] is not None and owner[key]._version != seen for owner, key, seen in self._versions
        )

    def _compare(
        self, mine: Mapping[str, Tensor], theirs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        for name in [*mine, *theirs]:
            here, there = mine.get(name), theirs.get(name)
            found = (tuple(here.shape), here.dtype) if here is not None else None
            if found != there:
                raise StateMismatch(
                    f"{self.name}.{name}: the state has {_say(there)}, the module {_say(found)}",
                    do="build the same module as before, or start a new run directory",
                )


def _places(root: nn.Module, kind: str) -> list[tuple[str, dict[str, Any], str]]:
    """(full name, the owner's dictionary, key) of each parameter or buffer: walking the modules at every
    commit would cost more than looking at what they own."""
    return [
        (f"{prefix}.{key}" if prefix else key, getattr(module, kind), key)
        for prefix, module in root.named_modules()
        for key in getattr(module, kind)
    ]


def _say(shape_and_dtype: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "no such tensor" if shape_and_dtype is None else f"{shape_and_dtype[1]} {list(shape_and_dtype[0])}"


class TrackedOptimizer(Tracked):
    """Per-parameter state by parameter name, and the hyperparameters of the groups.

    Args:
        names: names of the parameters of all tracked modules.
        on_step: called before each step of the optimizer.
    """

    kind = "optimizer"
    target: Optimizer

    def __init__(
        self, name: str, target: Optimizer, names: Mapping[Tensor, str], on_step: Callable[[], None]
    ) -> None:
        super().__init__(name, target)
        self._groups = [
            [names.get(parameter, f"group{g}.{i}") for i, parameter in enumerate(group["params"])]
            for g, group in enumerate(target.param_groups)
        ]
        self._handle = target.register_step_pre_hook(lambda *_: on_step())
        self._hyper: list[dict[str, Any]] = []

    @property
    def sharded(self) -> bool:
        return any(isinstance(parameter, DTensor) for _, parameter in self._named())

    def _named(self) -> Iterable[tuple[str, Tensor]]:
        for names, group in zip(self._groups, self.target.param_groups, strict=True):
            yield from zip(names, group["params"], strict=True)

    def capture(self) -> tuple[Layout, list[Tensor]]:
        tensors: list[Tensor] = []
        hyper = [
            _trees.encode(
                {k: v for k, v in group.items() if k != "params"}, tensors, f"{self.name}.param_groups[{g}]"
            )
            for g, group in enumerate(self.target.param_groups)
        ]
        state = {
            name: _trees.encode(self.target.state[parameter], tensors, f"{self.name}.state[{name}]")
            for name, parameter in self._named()
            if self.target.state.get(parameter)
        }
        body = {"params": self._groups, "hyper": hyper, "state": state}
        return {"kind": self.kind, "body": body, "specs": [_trees.spec(t) for t in tensors]}, tensors

    def prepare(self, layout: Layout) -> list[Tensor]:
        self._check(layout)
        body, specs = layout["body"], layout["specs"]
        self._compare(body["params"])
        made: dict[int, Tensor] = {}
        for name, parameter in self._named():
            for key, index in tensors_in(body["state"].get(name)):
                mine = self.target.state.get(parameter, {}).get(key)
                made[index] = _like(specs[index], parameter, mine)
        for index, wanted in enumerate(specs):
            if index not in made:
                made[index] = _trees.empty(wanted)
        return [made[index] for index in range(len(specs))]

    def finish(self, layout: Layout, tensors: list[Tensor]) -> None:
        state = layout["body"]["state"]
        for name, parameter in self._named():
            if name in state:
                self.target.state[parameter] = _trees.decode(state[name], tensors)
            else:
                self.target.state.pop(parameter, None)
        self._hyper = [_trees.decode(hyper, tensors) for hyper in layout["body"]["hyper"]]
        self.roll_back()

    def adopt(self, old: Tracked) -> None:
        if not isinstance(old, TrackedOptimizer):
            raise StateMismatch(f"{self.name!r} was tracked as {old.kind}, now as {self.kind}")
        if old.target is not self.target:
            self._compare(old._groups)
            live = dict(old._named())
            for name, parameter in self._named():
                if live[name] in old.target.state:
                    self.target.state[parameter] = old.target.state[live[name]]
        self._hyper = _hyperparameters(old.target)
        self.roll_back()

    def shadow(self) -> None:
        self._hyper = _hyperparameters(self.target)

    def roll_back(self) -> None:
        for group, hyper in zip(self.target.param_groups, self._hyper, strict=False):
            for key, value in hyper.items():
                if isinstance(group.get(key), Tensor) and isinstance(value, Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value

    def release(self) -> None:
        self._handle.remove()

    def _compare(self, groups: list[list[str]]) -> None:
        if [list(names) for names in groups] != self._groups:
            missing = sorted({n for g in groups for n in g} - {n for g in self._groups for n in g})
            extra = sorted({n for g in self._groups for n in g} - {n for g in groups for n in g})
            raise StateMismatch(
                f"optimizer {self.name!r} has other parameters or groups than its state"
                + (f" (only in the state: {', '.join(missing[:3])})" if missing else "")
                + (f" (only here: {', '.join(extra[:3])})" if extra else ""),
                do="build it over the same parameters in the same groups as before",
            )


def _hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {
            key: value.detach().clone() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key != "params"
        }
        for group in optimizer.param_groups
    ]


def tensors_in(encoded: Any) -> list[tuple[str, int]]:
    """(key, index) of the tensors directly in an encoded per-parameter state."""
    if not isinstance(encoded, dict):
        return []
    return [(k, v["__tensor__"]) for k, v in encoded.items() if isinstance(v, dict) and "__tensor__" in v]


def _like(wanted: _trees.Spec, parameter: Tensor, mine: Any) -> Tensor:
    """`mine` where it fits, else a tensor of the spec; one with the parameter's shape lies as the parameter
    does."""
    shape, dtype = tuple(wanted[1]), _trees.dtype_of(wanted)
    if isinstance(mine, Tensor) and tuple(mine.shape) == shape and mine.dtype == dtype:
        return mine.detach()
    if shape == tuple(parameter.shape) and (shape or wanted[3] != "cpu"):
        return torch.empty_like(parameter.detach(), dtype=dtype, requires_grad=False)
    return _trees.empty(wanted, parameter.device)


class TrackedStateful(Tracked):
    """Anything else with `state_dict` and `load_state_dict`: a learning-rate scheduler, a scaler, the user's
    own."""

    kind = "stateful"

    def __init__(self, name: str, target: Any) -> None:
        super().__init__(name, target)
        self._shadow: tuple[Layout, list[Tensor]] | None = None

    def capture(self) -> tuple[Layout, list[Tensor]]:
        tensors: list[Tensor] = []
        body = _trees.encode(self.target.state_dict(), tensors, self.name)
        return {"kind": self.kind, "body": body, "specs": [_trees.spec(t) for t in tensors]}, tensors

    def prepare(self, layout: Layout) -> list[Tensor]:
        self._check(layout)
        return [_trees.empty(wanted) for wanted in layout["specs"]]

    def finish(self, layout: Layout, tensors: list[Tensor]) -> None:
        self.target.load_state_dict(_trees.decode(layout["body"], tensors))

    def adopt(self, old: Tracked) -> None:
        if not isinstance(old, TrackedStateful):
            raise StateMismatch(f"{self.name!r} was tracked as {old.kind}, now as {self.kind}")
        if old.target is not self.target:
            self.finish(*old.capture())

    def shadow(self) -> None:
        layout, tensors = self.capture()
        self._shadow = (copy.deepcopy(layout), [tensor.clone() for tensor in tensors])

    def roll_back(self) -> None:
        if self._shadow is not None:
            layout, tensors = self._shadow
            self.finish(layout, [tensor.clone() for tensor in tensors])


def wrap(name: str, target: Any, names: Mapping[Tensor, str], on_step: Callable[[], None]) -> Tracked:
    """The tracked form of `target`. Raises StateMismatch for what has no state."""
    if isinstance(target, nn.Module):
        return TrackedModule(name, target)
    if isinstance(target, Optimizer):
        return TrackedOptimizer(name, target, names, on_step)
    if callable(getattr(target, "state_dict", None)) and callable(getattr(target, "load_state_dict", None)):
        return TrackedStateful(name, target)
    raise StateMismatch(
        f"job.track({name}=…): a {type(target).__qualname__} has no state to track",
        valid="a module, an optimizer, or an object with state_dict() and load_state_dict()",
    )
