"""How kernels are timed: CUDA-graph replays over inputs that rotate out of the L2 cache, medians."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

# More than any L2 cache holds several times over.
ROTATED_BYTES = 220_000_000


def _elapsed(run: Callable[[], Any]) -> float:
    """Microseconds between two events around a call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def graph_time(calls: Sequence[Callable[[], Any]], repeats: int = 15) -> float:
    """Median microseconds of one of some calls, replayed in turn inside one CUDA graph.

    Args:
        calls: run in this order; to leave the cache behind, they should read more than `ROTATED_BYTES`.
        repeats: replays.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Threads of collective libraries call CUDA, too.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for call in calls:
            call()
    times = [_elapsed(graph.replay) / len(calls) for _ in range(repeats + 3)]
    return statistics.median(times[3:])


def eager_time(calls: Sequence[Callable[[], Any]], repeats: int = 15) -> float:
    """Median microseconds of one of some calls, made in turn by Python without waiting in between.

    Args:
        calls: as in `graph_time`.
        repeats: rounds of all calls.
    """

    def call_all() -> None:
        for call in calls:
            call()

    times = [_elapsed(call_all) / len(calls) for _ in range(repeats + 3)]
    return statistics.median(times[3:])


def copies_to_rotate(nbytes: int) -> int:
    """How many copies of a weight leave the cache behind."""
    return max(2, -(-ROTATED_BYTES // nbytes))


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second of a large device-to-device copy.

    Not replayed from a graph: there the driver copies more slowly, which would flatter everything else.
    """
    source = torch.empty(1 << 29, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    times = [_elapsed(lambda: target.copy_(source)) for _ in range(12)]
    return 2 * source.nbytes / (statistics.median(times[3:]) * 1e-6)
