"""Checkpoints of other int4 libraries, read and written."""
