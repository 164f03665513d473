"""Fewer kernels between the matrix products of a loaded model."""
