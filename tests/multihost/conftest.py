"""What the multi-host tests share, and the table that a run of them prints at its end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "e2e"), str(Path(__file__).parent)]

from table import ROWS, as_markdown  # noqa: E402


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ROWS:
        terminalreporter.section("scenarios on several hosts")
        terminalreporter.write_line(as_markdown())
