"""The process that makes snapshots durable: one a node and run directory, out of the training's way, outliving
it. Torch-free."""

from autoglm_elastic.keeper._pending import KeeperGone, Pending
from autoglm_elastic.keeper.client import AGENT, Keeper
from autoglm_elastic.keeper.inprocess import InProcess, open_keeper
from autoglm_elastic.keeper.job import PackImage, WriteJob
from autoglm_elastic.keeper.segments import Segment

__all__ = [
    "AGENT",
    "InProcess",
    "Keeper",
    "KeeperGone",
    "PackImage",
    "Pending",
    "Segment",
    "WriteJob",
    "open_keeper",
]
