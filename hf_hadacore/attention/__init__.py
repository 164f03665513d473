"""Rotated 8-bit attention, its key/value cache, and their place in transformers."""
