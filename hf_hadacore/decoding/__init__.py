"""Decoding without waiting for the CPU: one CUDA graph per step inside `generate`."""
