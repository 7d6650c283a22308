"""A folder or file of an export appears whole or not at all: written under another name beside it, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from autoglm_elastic.errors import PlatformError, UsageError


@contextlib.contextmanager
def fresh(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends well, and is removed otherwise. Raises UsageError where
    something is there already, PlatformError for what the file system refuses."""
    if os.path.lexists(target):
        raise UsageError(f"{target} exists", do="give a name that is free")
    building = target.with_name(f".{target.name}-{secrets.token_hex(6)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building.mkdir()
        yield building
        for path in (*building.iterdir(), building, target.parent):
            _sync(path)
        building.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise PlatformError(f"writing {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
