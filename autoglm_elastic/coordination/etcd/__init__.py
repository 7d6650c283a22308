"""The coordination store on etcd v3: what its address means, here; the store itself in `store.py`.

This face needs no package of the extra `etcd` and imports none, so that an address can be checked before
anything starts. `store.py` does, and starts threads when a store is opened: not before the zygote is forked.
"""

from __future__ import annotations

import importlib.util
from typing import Final

from autoglm_elastic.coordination.etcd.target import SCHEME, VALID, EtcdTarget, parse, with_options
from autoglm_elastic.errors import UsageError

__all__ = ["SCHEME", "VALID", "EtcdTarget", "parse", "require", "with_options"]

_MODULES: Final = ("etcd3", "grpc", "google.protobuf")


def require() -> None:
    """Raises `UsageError` when a package of the extra is not installed. Imports none."""
    missing = [name for name in _MODULES if not _is_there(name)]
    if missing:
        raise UsageError(
            f"etcd needs {', '.join(missing)}, not installed", do="pip install 'autoglm-elastic[etcd]'"
        )


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
