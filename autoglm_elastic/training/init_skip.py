"""Parameter initialisation is not paid twice: while a restore is coming, random fills of parameters do
nothing.

Only fills of `nn.Parameter`s are skipped, never those of other tensors. A parameter that then turns out not
to be restored is filled after all, with what was skipped, so nothing is ever left uninitialised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FILLS: Final = frozenset(
    getattr(Tensor, name)
    for name in (
        "normal_",
        "uniform_",
        "random_",
        "bernoulli_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "cauchy_",
        "erfinv_",
    )
)


_RECIPES: Final = frozenset(
    getattr(nn.init, name)
    for name in (
        "uniform_",
        "normal_",
        "trunc_normal_",
        "xavier_uniform_",
        "xavier_normal_",
        "kaiming_uniform_",
        "kaiming_normal_",
        "orthogonal_",
        "sparse_",
    )
)


class SkippedInitialization(TorchFunctionMode):
    """Active from `start` to `stop`; at most once."""

    def __init__(self) -> None:
        super().__init__()
        self._skipped: list[tuple[nn.Parameter, Callable[..., Any], Sequence[Any], Mapping[str, Any]]] = []
        self._active = False

    def start(self) -> None:
        self._active = True
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self, restored: Iterable[Tensor]) -> None:
        """Initialisation is real again; parameters that are not among `restored` get theirs now.
        Idempotent."""
        if not self._active:
            return
        self._active = False
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        known = {id(tensor) for tensor in restored}
        with torch.no_grad():
            for parameter, fill, args, kwargs in self._skipped:
                if id(parameter) not in known:
                    fill(*args, **kwargs)
        self._skipped.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in _FILLS or func in _RECIPES:
            target = args[0] if args else given.get("tensor")
            if isinstance(target, nn.Parameter):
                self._skipped.append((target, func, args, given))
                return target
        return func(*args, **given)
