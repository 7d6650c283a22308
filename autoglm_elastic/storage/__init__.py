"""Blobs adapters: where the bytes of a run lie. They know nothing of snapshots."""

from autoglm_elastic.storage.local import LocalBlobs, SyncFailed
from autoglm_elastic.storage.open import is_url, modules_of, open_blobs

__all__ = ["LocalBlobs", "SyncFailed", "is_url", "modules_of", "open_blobs"]
