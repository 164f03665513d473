"""int4 weights times 16-bit activations: ours, cuBLAS and every peer that can be imported, in one run.

    python scripts/benchmark_w4a16.py --json scripts/results/w4a16.json

Times are microseconds of a call, medians of CUDA-graph replays that rotate through enough copies of the
weight to leave the L2 cache behind. The floor is the time in which a device-to-device copy moves as many
bytes as the product must read and write. Errors are relative L2 against a float64 product with the weights
exactly as stored, in multiples of the error of rounding the exact result once.

The second table re-creates that of SplitK W4A16 (arXiv:2402.00025) with the portable Triton kernel: its
schedule with K split over programs against the one without, for square weights and few tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
import typer
from check_w4a16 import in_floors
from gpu_processes import process_pool
from gpu_report import JsonFile, about_this_run, require_gpu, write_report
from w4a16_peers import GROUP, PEERS, Problem

from hf_hadacore import int4
from hf_hadacore.kernels import w4a16_triton
from hf_hadacore.kernels.measure import copies_to_rotate, copy_bandwidth, graph_time

# N x K: the matrices of 8B and 70B models and the squares of the published figures.
SHAPES = "4096x4096,6144x4096,14336x4096,28672x4096,4096x14336,8192x8192,28672x8192,8192x28672,16384x16384"
TOKENS = "1,4,8,16,32,64,128,256,1024,4096"
SPLIT_SIZES = (512, 1024, 2048, 4096, 8192, 16384)
SPLIT_TOKENS = (1, 4, 16)
SPLITS = (1, 2, 4, 8, 16)
# Rows of a result that are compared with float64.
CHECKED_ROWS = 64
# Beyond this it takes tens of milliseconds.
MAX_TINYGEMM_TOKENS = 64


def make_problem(n: int, k: int, dtype: torch.dtype) -> Problem:
    generator = torch.Generator("cuda").manual_seed(n + k)
    packed = torch.empty((n, k // 8), dtype=torch.int32, device="cuda").random_(
        -(2**31), 2**31 - 1, generator=generator
    )
    scale = torch.empty((n, k // GROUP), device="cuda").uniform_(0.5, 1.5, generator=generator)
    # bf16 values of a size that keeps sums in the range of fp16; exact in both dtypes.
    return Problem(packed, (scale / (4.6 * k**0.5)).bfloat16().to(dtype))


def floor_bytes(n: int, k: int, m: int) -> int:
    """What a symmetric product must move: nibbles, 16-bit scales, x and the result."""
    return n * k // 2 + 2 * n * (k // GROUP) + 2 * m * (n + k)


def measure_shape(
    n: int, k: int, tokens: Sequence[int], peers: list[str], bandwidth: float, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """Every peer on one weight; a peer that fails is noted in `skipped`."""
    rows: list[dict[str, Any]] = []
    for m in tokens:
        floor = floor_bytes(n, k, m) / bandwidth * 1e6
        rows.append({"n": n, "k": k, "m": m, "floor_us": round(floor, 2), "us": {}, "error_in_floors": {}})
    for name in peers:
        make, dtype = PEERS[name]
        problem = make_problem(n, k, dtype)
        weight = int4.dequantize(*problem, group_size=GROUP, dtype=torch.float64)
        try:
            peer = make(problem, tokens)
            count = copies_to_rotate(sum(tensor.nbytes for tensor in peer.weights))
            copies = [peer.weights, *(tuple(t.clone() for t in peer.weights) for _ in range(count - 1))]
            for row in rows:
                if name.startswith("tinygemm") and row["m"] > MAX_TINYGEMM_TOKENS:
                    continue
                x = torch.randn(row["m"], k, device="cuda").to(dtype)
                y = peer.call(peer.weights, x)
                exact = x[-CHECKED_ROWS:].double() @ weight.T
                row["error_in_floors"][name] = round(in_floors(y[-CHECKED_ROWS:], exact), 2)
                calls = [partial(peer.call, copy, x) for copy in copies]
                repeats = max(1, (12 if row["m"] <= 64 else 4) // len(calls))
                row["us"][name] = round(graph_time(calls * repeats, repeats=11), 2)
        except Exception as error:
            skipped[f"{name} {n}x{k}"] = f"{type(error).__name__}: {error}"[:200]
        del weight
        torch.cuda.empty_cache()
    return rows


def compile_ahead(shapes: list[tuple[int, int]], tokens: Sequence[int], peers: list[str]) -> None:
    """Compile our kernels in many processes; this one then finds them in Triton's cache on disk."""
    jobs = [(n, k, m, name) for n, k in shapes for m in tokens for name in peers if name.startswith("ours")]
    with process_pool() as pool:
        list(pool.map(_compile, jobs))


def _compile(job: tuple[int, int, int, str]) -> None:
    n, k, m, name = job
    make, dtype = PEERS[name]
    peer = make(make_problem(n, k, dtype), [m])
    peer.call(peer.weights, torch.zeros(m, k, device="cuda", dtype=dtype))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def measure_splits() -> list[dict[str, Any]]:
    """The portable kernel's times by split_k; 1 is the schedule without a split."""
    rows = []
    for size in SPLIT_SIZES:
        problem = make_problem(size, size, torch.float16)
        count = copies_to_rotate(problem.packed.nbytes)
        copies = [tuple(t.clone() for t in problem) for _ in range(min(count, 64))]
        for m in SPLIT_TOKENS:
            x = torch.randn(m, size, device="cuda", dtype=torch.float16)
            out = torch.empty(m, size, device="cuda", dtype=torch.float16)
            times = {}
            for split_k in SPLITS:
                schedule = w4a16_triton.Schedule(16, 64, split_k)
                calls = [
                    partial(w4a16_triton.launch, x, packed, scale, None, None, None, GROUP, out, schedule)
                    for packed, scale in copies
                ]
                times[split_k] = round(graph_time(calls, repeats=9), 2)
            rows.append({"size": size, "m": m, "us_by_split_k": times})
    return rows


def split_gains(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Average speed-up over the schedule without a split, by split_k and for the best of them, minus one."""
    gains: dict[str, float] = {}
    for split_k in SPLITS[1:]:
        ratios = [row["us_by_split_k"][1] / row["us_by_split_k"][split_k] for row in rows]
        gains[str(split_k)] = round(sum(ratios) / len(ratios) - 1, 3)
    best = [row["us_by_split_k"][1] / min(row["us_by_split_k"].values()) for row in rows]
    gains["best"] = round(sum(best) / len(best) - 1, 3)
    return gains


def print_table(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        cells = [
            f"{name} {us:.1f} ({row['floor_us'] / us:.0%}, {row['error_in_floors'][name]:.2f})"
            for name, us in row["us"].items()
        ]
        print(f"{row['n']}x{row['k']} M={row['m']} floor {row['floor_us']}: " + "  ".join(cells))


def main(
    shapes: Annotated[str, typer.Option(help="NxK, separated by commas.")] = SHAPES,
    tokens: Annotated[str, typer.Option(help="Separated by commas.")] = TOKENS,
    peers: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(PEERS),
    splits: Annotated[bool, typer.Option(help="Measure the SplitK table.")] = True,
    json_file: JsonFile = None,
) -> None:
    require_gpu()
    bandwidth = copy_bandwidth()
    skipped: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    sizes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in shapes.split(","))]
    counts, names = list(map(int, tokens.split(","))), peers.split(",")
    compile_ahead(sizes, counts, names)
    for n, k in sizes:
        rows += measure_shape(n, k, counts, names, bandwidth, skipped)
    report: dict[str, Any] = {
        **about_this_run(
            f"python scripts/benchmark_w4a16.py --shapes {shapes} --tokens {tokens} --peers {peers}"
        ),
        "group_size": GROUP,
        "symmetric": True,
        "copy_bandwidth_tb_per_s": round(bandwidth / 1e12, 3),
        "rows": rows,
        "skipped": skipped,
    }
    if splits:
        report["split_k"] = measure_splits()
        report["split_k_gain"] = split_gains(report["split_k"])
    write_report(report, json_file)
    print_table(rows)
    print(skipped, report.get("split_k_gain"))


if __name__ == "__main__":
    typer.run(main)
