"""Kernels: one file per operation, each with a pure-torch reference behind the fast versions."""
