"""Times of calls that Python makes; `hf_hadacore.kernels.measure` has those of kernels."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def python_time(run: Callable[[], Any], calls: int = 200) -> float:
    """Microseconds until a call returns, its kernel aside: the queue is empty and short."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)
