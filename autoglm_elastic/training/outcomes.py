"""How a user's function can be left other than by returning or by an error of its own.

Imports nothing of torch, so that these names can be used anywhere.
"""

from __future__ import annotations

from autoglm_elastic.errors import ElasticError, Fault


class WorldChanged(BaseException):
    """The generation is over: unwind to `elastic.run`, which enters the function again.

    A `BaseException`, so that `except Exception` around a step does not swallow it. Let it pass.
    """

    def __init__(self, generation: int, reason: str) -> None:
        super().__init__(f"generation {generation} is over: {reason}")
        self.generation = generation
        self.reason = reason


class StateMismatch(ElasticError):
    """What is tracked now does not fit the state that it should continue from."""

    fault = Fault.USER


class MisuseError(ElasticError):
    """The job was used in a way that cannot work."""

    fault = Fault.USER
