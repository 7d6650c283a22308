"""What lies in a run directory: documents, packs, the version index, and how a commit is decided. No torch."""
