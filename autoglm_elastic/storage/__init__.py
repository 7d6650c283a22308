"""Blobs adapters: where the bytes of a run lie. They know nothing of snapshots."""

from autoglm_elastic.storage.local import LocalBlobs, SyncFailed

__all__ = ["LocalBlobs", "SyncFailed"]
