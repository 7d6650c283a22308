"""Rules that all adapters share: what a blob may be called, which keys are blobs, which ranges lie in one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from autoglm_elastic.errors import CorruptSnapshot, UsageError

NAME_PARTS_MAX: Final = 4
NAME_BYTES_MAX: Final = 255

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*")


def checked_name(name: str) -> tuple[str, ...]:
    """The parts of a blob's name. Raises UsageError for a name that could leave the root or hide in it."""
    parts = tuple(name.split("/"))
    if (
        len(name) > NAME_BYTES_MAX
        or len(parts) > NAME_PARTS_MAX
        or not all(_PART.fullmatch(part) for part in parts)
    ):
        raise UsageError(
            f"blob name {name[:80]!r}",
            valid=f"at most {NAME_PARTS_MAX} parts of letters, digits and ._-+= joined by /",
        )
    return parts


def blob_names(keys: Iterable[str]) -> list[str]:
    """The keys that can be names of blobs, sorted; others in the same place are not ours."""
    return sorted(key for key in keys if _is_name(key))


def is_part(text: str) -> bool:
    """Whether it can stand between the slashes of a name."""
    return _PART.fullmatch(text) is not None


def _is_name(key: str) -> bool:
    try:
        checked_name(key)
    except UsageError:
        return False
    return True


def check_range(where: str, there: int, offset: int, nbytes: int) -> None:
    """Raises CorruptSnapshot for a range that does not lie in a blob of `there` bytes."""
    if offset < 0 or nbytes < 0 or offset + nbytes > there:
        raise CorruptSnapshot(f"{where} has {there} bytes, but {nbytes} from {offset} are wanted")
