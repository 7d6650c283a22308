"""Scenario, outcome and recovery time of what was tried, for people: not checked."""

from __future__ import annotations

from typing import Final

ROWS: Final[list[tuple[str, str, float]]] = []
"""(scenario, outcome, seconds from the fault to the next committed step)."""


def note(scenario: str, outcome: str, seconds: float) -> None:
    ROWS.append((scenario, outcome, seconds))


def as_markdown() -> str:
    lines = ["| scenario | outcome | fault → next committed step |", "| --- | --- | --- |"]
    lines += [f"| {scenario} | {outcome} | {seconds:.2f} s |" for scenario, outcome, seconds in ROWS]
    return "\n".join(lines)
