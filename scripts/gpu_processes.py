"""Several processes that share a GPU, because compiling takes most of the time of checks and benchmarks."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

# Two such pools fit a GPU's memory.
WORKERS = min(14, os.cpu_count() or 1)


def process_pool(workers: int = WORKERS) -> ProcessPoolExecutor:
    """Of processes that may use CUDA."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def in_processes(function: Callable[[Any], Any], jobs: list[Any]) -> list[Any]:
    """Map over processes: results, or what was raised instead.

    A compiler that aborts takes its process along, and with it all that waits. Jobs lost this way run again,
    each in a process of its own.
    """
    outcomes = _outcomes(function, jobs, WORKERS)
    lost = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, BrokenProcessPool)]
    with ThreadPoolExecutor(WORKERS) as threads:
        again = threads.map(lambda i: _outcomes(function, [jobs[i]], 1)[0], lost)
        for i, outcome in zip(lost, again, strict=True):
            outcomes[i] = outcome
    return outcomes


def _outcomes(function: Callable[[Any], Any], jobs: list[Any], workers: int) -> list[Any]:
    with process_pool(workers) as pool:
        futures = [pool.submit(_outcome, function, job) for job in jobs]
        wait(futures)
    # An exception of the future's itself is a process that ended.
    return [future.exception() or future.result() for future in futures]


def _outcome(function: Callable[[Any], Any], job: Any) -> Any:
    try:
        return function(job)
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {str(error)[:300]}")
