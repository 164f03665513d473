"""Measure which schedules of the Hopper W4A16 kernels are fastest on this GPU."""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
import triton
from tqdm import tqdm

from .._version import __version__
from ..errors import UnsupportedError
from . import w4a16_schedules as schedules
from .measure import copies_to_rotate, graph_time
from .w4a16_launch import launch
from .w4a16_tiled import prefers_tiles
from .w4a16_tiles import is_tileable

DEFAULT_TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024)

Shape = tuple[int, int]
_Job = tuple[int, int, int, int, torch.dtype, schedules.Schedule]


def tune(
    shapes: Iterable[Shape],
    tokens: Iterable[int],
    *,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = True,
) -> dict[str, schedules.Schedule]:
    """Time every candidate for every shape and number of tokens; random asymmetric weights.

    Args:
        shapes: (N, K) of the weights, multiples of 64 and 128.
        tokens: numbers of tokens; each stands for those of its bucket.
        group_size: g, or -1.
        dtype: fp16 or bf16.
        progress: show a progress bar.

    Returns:
        The fastest schedules, as `w4a16_schedules.write_table` takes them.

    Raises:
        UnsupportedError: there is no Hopper GPU, or a shape does not consist of whole tiles.
    """
    if not torch.cuda.is_available() or not prefers_tiles(torch.device("cuda", 0), 64, 128, group_size):
        raise UnsupportedError("tuning needs a Hopper GPU (compute capability 9.0) and Triton with Gluon")
    problems = [(n, k, schedules.bucket(m)) for n, k in shapes for m in tokens]
    for n, k, _ in problems:
        if not is_tileable(n, k):
            raise UnsupportedError(f"{n}x{k}: tuning needs N a multiple of 64 and K a multiple of 128")
    found = {problem: schedules.candidates(problem[2], *problem[:2]) for problem in problems}
    jobs = [(*problem, group_size, dtype, c) for problem, candidates in found.items() for c in candidates]
    _compile_all(jobs, progress)
    best: dict[str, schedules.Schedule] = {}
    for n, k, m in tqdm(problems, desc="measuring", disable=not progress):
        calls = _Problem(n, k, m, group_size, dtype)
        times = {schedule: calls.time(schedule) for schedule in found[n, k, m]}
        best[f"sm90 {n}x{k} {m}"] = min(times, key=lambda schedule: times[schedule])
    return best


def about() -> dict[str, Any]:
    """Device, versions and date, for a tuning file."""
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {"hf_hadacore": __version__, "torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.now(UTC).date().isoformat(),
    }


class _Problem:
    """A random product with enough copies of the weight to leave the L2 cache behind."""

    def __init__(
        self, n: int, k: int, m: int, group_size: int, dtype: torch.dtype, copies: int | None = None
    ):
        groups = 1 if group_size == -1 else k // group_size
        count = copies_to_rotate(n * k // 2) if copies is None else copies

        def values(dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((groups, n), dtype=dtype, device="cuda")

        self.weights = [
            (
                torch.empty((n, k // 8), dtype=torch.int32, device="cuda").random_(),
                values(dtype).uniform_(0.001, 0.02).t(),
                values(torch.uint8).random_(0, 16).t(),
            )
            for _ in range(count)
        ]
        self.x = torch.empty((m, k), dtype=dtype, device="cuda").normal_()
        self.out = torch.empty((m, n), dtype=dtype, device="cuda")
        self.group_size = group_size

    def run(self, index: int, schedule: schedules.Schedule) -> None:
        weight = self.weights[index]
        launch(self.x, *weight, None, None, self.group_size, self.out, schedule)

    def time(self, schedule: schedules.Schedule) -> float:
        calls = [partial(self.run, index, schedule) for index in range(len(self.weights))]
        return graph_time(calls * max(1, 8 // len(calls)), repeats=9)


def _compile_all(jobs: list[_Job], progress: bool) -> None:
    """Compile in many processes; this one then finds the kernels in Triton's cache on disk."""
    distinct = {_kernel_of(job): job for job in jobs}
    workers = min(len(distinct), os.cpu_count() or 1, 14)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = pool.map(_compile, distinct.values())
        list(tqdm(results, total=len(distinct), desc="compiling", disable=not progress))


def _kernel_of(job: _Job) -> tuple[Any, ...]:
    """What the compiled kernel depends on."""
    _, k, _, group_size, dtype, schedule = job
    split = -(-k // 128 // schedule.tiles)
    options = schedule._asdict()
    if not isinstance(schedule, schedules.SkinnySchedule):
        del options["tiles"]
    return (group_size, dtype, split, *options.items())


def _compile(job: _Job) -> None:
    n, k, m, group_size, dtype, schedule = job
    _Problem(n, k, m, group_size, dtype, copies=1).run(0, schedule)
    torch.cuda.synchronize()
