"""Where a run's membership lives in the store: the names of its keys, made and read in one place."""

from __future__ import annotations

from typing import Final
from urllib.parse import quote, unquote

ROOT: Final = "/autoglm/"


class Keys:
    """Names under `/autoglm/<run id>/`. Run ids and node names are quoted, so that no slash of theirs splits
    a key."""

    def __init__(self, run_id: str) -> None:
        self.prefix = f"{ROOT}{quote(run_id, safe='')}/"
        self.notes = f"{ROOT}{quote(run_id, safe='')}+notes/"
        """Beside what every agent watches: a note is for who looks on, and would wake all the others."""
        self.leader = f"{self.prefix}leader"
        self.generation = f"{self.prefix}generation"
        self.closed = f"{self.prefix}closed"

    def member(self, node: str) -> str:
        return f"{self.prefix}members/{quote(node, safe='')}"

    def broken(self, generation: int, node: str) -> str:
        return f"{self.prefix}broken/{generation}/{quote(node, safe='')}"

    def finished(self, generation: int, node: str) -> str:
        return f"{self.prefix}finished/{generation}/{quote(node, safe='')}"

    def entered(self, generation: int, node: str) -> str:
        return f"{self.prefix}entered/{generation}/{quote(node, safe='')}"

    def c10d(self, generation: int) -> str:
        return f"{self.prefix}c10d/{generation}"

    def history(self, generation: int) -> str:
        return f"{self.prefix}generations/{generation}"

    def note(self, node: str) -> str:
        return f"{self.notes}{quote(node, safe='')}"

    def node_of_note(self, key: str) -> str:
        return unquote(key.removeprefix(self.notes))

    def parse(self, key: str) -> tuple[str, ...]:
        """`("broken", "3", "node")` of its key; `("leader",)` of the leader's."""
        return tuple(unquote(part) for part in key.removeprefix(self.prefix).split("/"))
