"""Snapshots: whole or absent, verified, in a format that stock tools open (docs/format.md)."""

from autoglm_elastic.catalog.format import CatalogEntry
from autoglm_elastic.catalog.verify import Problem
from autoglm_elastic.snapshot.commit import SaveResult
from autoglm_elastic.snapshot.dcp import SafetensorsReader, SafetensorsWriter
from autoglm_elastic.snapshot.handle import Handle
from autoglm_elastic.snapshot.line import Line
from autoglm_elastic.snapshot.load import LoadReport
from autoglm_elastic.snapshot.manager import CheckpointManager
from autoglm_elastic.snapshot.votes import GroupVotes, SingleVotes

__all__ = [
    "CatalogEntry",
    "CheckpointManager",
    "GroupVotes",
    "Handle",
    "Line",
    "LoadReport",
    "Problem",
    "SafetensorsReader",
    "SafetensorsWriter",
    "SaveResult",
    "SingleVotes",
]
