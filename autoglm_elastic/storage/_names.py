"""Rules that all adapters share beside `local.checked_name`: which keys are blobs, which ranges lie in one."""

from __future__ import annotations

from collections.abc import Iterable

from autoglm_elastic.errors import CorruptSnapshot, UsageError
from autoglm_elastic.storage.local import checked_name


def blob_names(keys: Iterable[str]) -> list[str]:
    """The keys that can be names of blobs, sorted; others in the same place are not ours."""
    return sorted(key for key in keys if _is_name(key))


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
