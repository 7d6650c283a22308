"""`autoglm bench checkpoint`: what a snapshot costs the training, how soon it is durable, and how fast it is
loaded; beside torch's own ways and the limits of the machine, in one run.

May touch: processes that it starts itself, by pid, and one folder of its own on the disk to be measured. Must
never: reach into the engine, except for the planning that `planners.py` calls without input or output; hand a
contender anything that the others do not get.
"""

from autoglm_elastic.bench.checkpoint.run import DIR, main
from autoglm_elastic.bench.checkpoint.spec import options

__all__ = ["DIR", "main", "options"]
