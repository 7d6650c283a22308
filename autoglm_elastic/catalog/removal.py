"""Taking back what a snapshot that never happened has written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from autoglm_elastic.errors import ElasticError
from autoglm_elastic.ports import StreamBlobs


def remove(blobs: StreamBlobs, names: Iterable[str]) -> None:
    """What cannot be removed stays, as garbage that nothing names."""
    for name in names:
        with contextlib.suppress(ElasticError):
            blobs.delete(name)
