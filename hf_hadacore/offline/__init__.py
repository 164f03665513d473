"""Quantizing checkpoints on disk: streamed, calibrated, atomic, resumable."""
