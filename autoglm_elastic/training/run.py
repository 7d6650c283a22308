"""`elastic.run`: the decorator around a training function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from autoglm_elastic.training import endings
from autoglm_elastic.training.job import Job
from autoglm_elastic.training.outcomes import MisuseError
from autoglm_elastic.training.session import Session

P = ParamSpec("P")
T = TypeVar("T")

_session: Session | None = None
_inside = False


def run(function: Callable[Concatenate[Job, P], T]) -> Callable[P, T]:
    """Enter `function(job, …)` again, in the same process, whenever the world changes.

    Returns what the function returns. Its errors pass through; `WorldChanged` never does. Without a launcher
    the world is this process, or what stock torchrun says, and each call is a training of its own.
    """

    @functools.wraps(function)
    def entered(*args: P.args, **kwargs: P.kwargs) -> T:
        global _session, _inside
        if _inside:
            raise MisuseError("elastic.run inside of elastic.run", valid="one training function at a time")
        if _session is None or not _session.elastic:
            _session = Session()
        _inside = True
        try:
            return _session.execute(function, args, kwargs)
        except Exception as error:
            endings.record(error)
            raise
        finally:
            _inside = False

    return entered
