"""Programs to read and to start from. `gpt.py` is elastic, `ddp.py` the same for plain torchrun.

May touch: what any user may, the public names of `autoglm_elastic`. Must never: reach into a room.
"""
