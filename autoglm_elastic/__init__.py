"""AutoGLM Elastic: training that goes on when workers, nodes or stores die.

The whole public face. Names are imported when they are first used, so that `import autoglm_elastic` costs
nothing and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoglm_elastic.snapshot import CheckpointManager, SafetensorsReader, SafetensorsWriter
    from autoglm_elastic.training.job import Job
    from autoglm_elastic.training.outcomes import WorldChanged
    from autoglm_elastic.training.run import run

__version__ = "0.1.0"

__all__ = ["CheckpointManager", "Job", "SafetensorsReader", "SafetensorsWriter", "WorldChanged", "run"]

_HOMES = {
    "run": "autoglm_elastic.training.run",
    "Job": "autoglm_elastic.training.job",
    "WorldChanged": "autoglm_elastic.training.outcomes",
    "CheckpointManager": "autoglm_elastic.snapshot",
    "SafetensorsWriter": "autoglm_elastic.snapshot",
    "SafetensorsReader": "autoglm_elastic.snapshot",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
