"""A deterministic simulator of a whole job: virtual time, faults from a seed, production's own core machines.

Nothing here touches the world: no clock, no file, no socket, no thread. `run(seed)` draws a world and its
faults from the seed and lets the job run to its end; the checker watches the invariants of the design after
every event. A seed that fails fails again when it is run again. See README.md beside this file.
"""

from __future__ import annotations

from autoglm_elastic.sim.config import Fault, SimConfig, SimResult, Violation
from autoglm_elastic.sim.core import Core
from autoglm_elastic.sim.generate import random_config
from autoglm_elastic.sim.simulation import run, search

__all__ = ["Core", "Fault", "SimConfig", "SimResult", "Violation", "random_config", "run", "search"]
