"""The modules that hold int4 weights."""
