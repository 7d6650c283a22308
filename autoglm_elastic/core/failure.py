"""One failure of one worker or node, as it travels and as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

MESSAGE_CHARS_MAX: Final = 500
"""A failure's message is one line for a person; the traceback is in the worker's error file."""

_SIGNALS: Final = {
    1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 5: "SIGTRAP", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE",
    9: "SIGKILL", 10: "SIGUSR1", 11: "SIGSEGV", 12: "SIGUSR2", 13: "SIGPIPE", 14: "SIGALRM", 15: "SIGTERM",
    24: "SIGXCPU", 25: "SIGXFSZ", 31: "SIGSYS",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker that died, or (with `local_rank` and `rank` -1) a node that left.

    `exit_code` is negative for a signal. `step` is the newest committed step that its node had seen, -1 for
    none. `message` is one line. `wall_time` is for people only: no decision depends on it.
    """

    node: str
    local_rank: int
    rank: int
    exit_code: int
    message: str
    step: int
    wall_time: float

    def __post_init__(self) -> None:
        line = " ".join(self.message.split())
        if len(line) > MESSAGE_CHARS_MAX:
            line = line[: MESSAGE_CHARS_MAX - 1] + "…"
        object.__setattr__(self, "message", line)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Failure:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not write."""
        return cls(
            node=str(data["node"]),
            local_rank=int(data["local_rank"]),
            rank=int(data["rank"]),
            exit_code=int(data["exit_code"]),
            message=str(data["message"]),
            step=int(data["step"]),
            wall_time=float(data["wall_time"]),
        )

    def __str__(self) -> str:
        if self.rank < 0:
            return self.message or f"node {self.node} left"
        text = f"rank {self.rank} on node {self.node} died: {describe_exit(self.exit_code)}"
        return f"{text}: {self.message}" if self.message else text


def node_left(node: str, step: int) -> Failure:
    """The failure that stands for the loss of a whole node."""
    return Failure(node, -1, -1, 0, f"node {node} left", step, 0.0)


def describe_exit(exit_code: int) -> str:
    """`signal 9 (SIGKILL)` or `exit code 1`."""
    if exit_code < 0:
        name = _SIGNALS.get(-exit_code)
        return f"signal {-exit_code} ({name})" if name else f"signal {-exit_code}"
    return f"exit code {exit_code}"
