"""Exit codes and the errors a person sees.

Every error says what we got, what is valid, what to do next, and whose fault it is. Libraries raise these; only
the command line prints them, as one line.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of `autoglm-run` and `autoglm` (docs/design.md, "Exit codes"). A signal n gives 128 + n."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    REQUEUE = 75
    DO_NOT_RESTART = 93


class Fault(enum.Enum):
    """Whose fault an error is."""

    USER = "user"
    PLATFORM = "platform"
    OURS = "autoglm"


class ElasticError(Exception):
    """An error for a person: `got`, what is `valid`, what to `do`.

    Args:
        got: what was found, in one clause.
        valid: what would have been right, or "" when `got` says it.
        do: the next command or step, or "".
    """

    fault = Fault.OURS
    exit_code = ExitCode.FAILED

    def __init__(self, got: str, *, valid: str = "", do: str = "") -> None:
        self.got, self.valid, self.do = got, valid, do
        parts = [got]
        if valid:
            parts.append(f"valid: {valid}")
        if do:
            parts.append(f"do: {do}")
        super().__init__("; ".join(parts))


class UsageError(ElasticError):
    """Wrong flags, configuration or run directory: nothing was started, nothing was changed."""

    fault = Fault.USER
    exit_code = ExitCode.USAGE


class PlatformError(ElasticError):
    """The machine did not give what was asked for: disk, port, permission, memory."""

    fault = Fault.PLATFORM


class CorruptSnapshot(ElasticError):
    """Bytes that do not verify, or a hostile or damaged file. Names the file."""

    fault = Fault.PLATFORM


class FencedError(ElasticError):
    """Something of a stale generation tried to change shared state."""

    fault = Fault.PLATFORM


def in_one_line(error: BaseException) -> str:
    """Its text. What it quotes of hostile input may bring line ends, and commands to a terminal."""
    words = " ".join(str(error).split())
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in words)
