"""From full-precision weights to int4 weights. Works on tensors; knows nothing of transformers."""
