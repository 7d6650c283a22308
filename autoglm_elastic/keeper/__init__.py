"""The process that makes snapshots durable: one a node and run directory, out of the training's way, outliving
it. Torch-free."""

from autoglm_elastic.keeper.client import AGENT, Keeper, KeeperGone, Pending, Segment
from autoglm_elastic.keeper.job import PackImage, WriteJob

__all__ = ["AGENT", "Keeper", "KeeperGone", "PackImage", "Pending", "Segment", "WriteJob"]
