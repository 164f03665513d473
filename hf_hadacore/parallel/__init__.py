"""Several GPUs: what lies where, permuted channels that no rank has to gather, sums in one shot."""
