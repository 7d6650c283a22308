"""`autoglm demo`: train `examples/gpt.py`, break it while it runs, and tell what that cost.

May touch: processes that it starts itself, by pid, and its own output folder. Must never: reach into a room;
it drives `autoglm-run` as a user does and knows of the run only what the run directory tells.
"""

from autoglm_elastic.bench.demo.story import STEPS, run

__all__ = ["STEPS", "run"]
