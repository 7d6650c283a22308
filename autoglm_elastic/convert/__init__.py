"""Snapshots from and to the formats of others: Hugging Face's safetensors, torch.distributed.checkpoint, torch.save."""

from autoglm_elastic.convert.foreign import open_source
from autoglm_elastic.convert.ingest import ingest
from autoglm_elastic.convert.to_dcp import export_dcp
from autoglm_elastic.convert.to_hf import export_hf
from autoglm_elastic.convert.values import compare_values

__all__ = ["compare_values", "export_dcp", "export_hf", "ingest", "open_source"]
