"""Tensor-parallel int4 MLPs: naive against TP-aware, on every number of ranks that this machine has GPUs for.

    python scripts/benchmark_tp.py --json scripts/results/tp.json
    python scripts/benchmark_tp.py --tp 1,8 --mlp llama-70b --tokens 1,16

The MLPs and the two algorithms are those of "TP-aware dequantization" (arXiv:2402.04925): see `tp_mlp`.
Weights are int4 in groups of 128, symmetric, in act-order, and run through the kernels that int4 layers use;
activations are fp16. "one-shot" is TP-aware with `hf_hadacore.kernels.all_reduce`.

Before anything is timed, results are compared with float64 on one rank (in multiples of the error of rounding
the exact result once), and the collectives of one MLP are counted in a profile. Times are microseconds of one
MLP, medians of the slowest rank, while the weights rotate out of the L2 cache: "eager" as Python launches it,
"graph" in replays of a CUDA graph.

Collectives are timed alone, too, over sizes. From those of two ranks and the products' times on one GPU a
model of other numbers of ranks is made; it stands beside what was measured where it was.

Without a GPU only correctness and collectives are checked, with gloo and small shapes.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from check_w4a16 import in_floors
from gpu_report import JsonFile, about_this_run, write_report
from rank_processes import run_ranks
from tp_mlp import (
    DTYPE,
    GROUP,
    SHAPES,
    SMALL,
    Problem,
    Share,
    all_reduce,
    aware,
    naive,
    permuted_chunk,
)
from tp_model import predictions

from hf_hadacore.kernels import all_reduce as one_shot
from hf_hadacore.kernels import w4a16_schedules as schedules
from hf_hadacore.kernels.measure import copies_to_rotate, eager_time, graph_time
from hf_hadacore.kernels.w4a16_launch import Product, launch, processors_of

TOKENS = "1,2,4,8,16"
# Numbers of ranks whose shares of an MLP are timed on one GPU, for the model.
MODELLED = (2, 4, 8)
# Bytes of a collective's result.
SIZES = tuple(1 << bits for bits in range(12, 21))
# Of the error over what roundings add up to.
MAX_ERROR = 1.25
# Ranks do not begin a replay at the same moment: it should take long.
CALLS = 32
# "Up to", at as many as eight ranks of A100 and H100 machines (arXiv:2402.04925).
PAPER = {"llama-70b": 1.81, "granite-20b": 1.78}

Call = Callable[[], Any]


def times(calls: Sequence[Call]) -> dict[str, float]:
    """Median microseconds of one of some calls on the slowest rank; nothing without a GPU."""
    if not torch.cuda.is_available():
        return {}
    calls = list(calls) * -(-CALLS // len(calls))
    worst = torch.tensor([eager_time(calls), graph_time(calls)], device="cuda")
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    eager, graph = worst.tolist()
    return {"eager_us": round(eager, 2), "graph_us": round(graph, 2)}


def collectives(call: Call) -> dict[str, int]:
    """The collectives of one call, by the names that the backend gives them, from a profile."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        match = re.search(r"nccl\w*Kernel_([A-Za-z]+)|gloo:(\w+)|(one_shot\w*)", event.key)
        if match:
            found[next(name for name in match.groups() if name)] += event.count
    return dict(found)


def is_same_everywhere(x: torch.Tensor) -> bool:
    """Whether all ranks have the same bits."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return all(torch.equal(part, parts[0]) for part in parts)


def compile_ahead(names: Sequence[str], tokens: Sequence[int], worlds: Sequence[int]) -> None:
    """Compile the products' kernels, all at the same time."""
    import triton

    processors = processors_of(torch.cuda.current_device())
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        for name in names:
            h, i, is_gated = SHAPES[name]
            for world in worlds:
                for n, k, has_perm in (((1 + is_gated) * i // world, h, True), (h, i // world, False)):
                    weight = Product(n, k, GROUP, DTYPE, False, False).tensors()
                    perm = torch.empty(k, dtype=torch.int32, device="meta") if has_perm else None
                    for m in tokens:
                        x, out = (torch.empty(m, size, dtype=DTYPE, device="meta") for size in (k, n))
                        schedule = schedules.choose(m, n, k, "sm90", processors, not has_perm)
                        launch(x, *weight[:3], perm, None, GROUP, out, schedule)


def measure_mlp(name: str, tokens: Sequence[int], has_one_shot: bool) -> dict[str, list[dict[str, Any]]]:
    """Rows of one MLP on the ranks of this process group."""
    rank, world = dist.get_rank(), dist.get_world_size()
    problem = Problem((SHAPES | SMALL)[name], torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    inputs = problem.tokens(max(tokens))
    exact = problem.exact(inputs)
    shares = {is_aware: rotated(Share(problem, rank, world, is_aware)) for is_aware in (False, True)}
    variants: dict[str, tuple[bool, Callable[..., torch.Tensor]]] = {
        "naive": (False, naive),
        "aware": (True, aware),
    }
    if has_one_shot:
        variants["one-shot"] = (True, partial(aware, reduce=one_shot.all_reduce))
    rows = []
    for m in tokens:
        x = inputs[:m]
        row: dict[str, Any] = {"mlp": name, "tp": world, "m": m}
        for variant, (is_aware, algorithm) in variants.items():
            calls = [partial(algorithm, share, x) for share in shares[is_aware]]
            y = calls[0]()
            row[variant] = {
                "error_in_floors": round(in_floors(y, exact[:m]), 2),
                "same_on_all_ranks": is_same_everywhere(y),
                "collectives": collectives(calls[0]),
                **times(calls),
            }
        rows.append(row)
    parts = []
    if world == 1 and torch.cuda.is_available():
        del shares
        parts = [part for count in MODELLED for part in measure_parts(name, problem, inputs, tokens, count)]
    return {"mlps": rows, "parts": parts}


def rotated(share: Share) -> list[Share]:
    """Copies of a share that leave the cache behind; the share alone without a GPU."""
    count = copies_to_rotate(share.nbytes) if torch.cuda.is_available() else 1
    return [share, *(share.copy() for _ in range(count - 1))]


def measure_parts(
    name: str, problem: Problem, inputs: torch.Tensor, tokens: Sequence[int], world: int
) -> list[dict[str, Any]]:
    """What one of several ranks does between the collectives, timed on one GPU."""
    shares = rotated(Share(problem, 0, world, is_aware=True))
    rows = []
    for m in tokens:
        products = [partial(aware, share, inputs[:m], reduce=lambda z: z) for share in shares]
        gathered = inputs.new_zeros(world * m, problem.shape.intermediate // world)
        permute = partial(permuted_chunk, gathered, problem.p2, 0, world)
        rows.append(
            {
                **{"mlp": name, "tp": world, "m": m},
                "products": times(products),
                "permute": times([permute]),
                "all-reduce_bytes": inputs[:m].nbytes,
                "all-gather_bytes": gathered.nbytes,
            }
        )
    return rows


def measure_collectives(has_one_shot: bool) -> list[dict[str, Any]]:
    """NCCL's collectives and one-shot all-reduces over sizes; the bytes are those of the result."""
    world, rows = dist.get_world_size(), []
    torchs = None
    if has_one_shot:
        try:
            torchs = TorchOneShot()
            torchs(torch.zeros(8, dtype=torch.bfloat16, device="cuda"))
        except (AttributeError, RuntimeError) as error:
            print(f"torch's one-shot all-reduce does not work here: {error}", flush=True)
            torchs = None
    for size in SIZES:
        x = torch.zeros(size // 2, dtype=DTYPE, device="cuda")
        part = torch.zeros(size // 2 // world, dtype=DTYPE, device="cuda")
        row = {
            "tp": world,
            "bytes": size,
            "all-reduce": times([partial(all_reduce, x)]),
            "all-gather": times([partial(dist.all_gather_into_tensor, torch.empty_like(x), part)]),
        }
        if has_one_shot and size <= one_shot.MAX_BYTES:
            row["one-shot"] = times([partial(one_shot.all_reduce, x)])
        if torchs is not None:
            row["torch-one-shot"] = times([partial(torchs, x.bfloat16())])
        rows.append(row)
    return rows


class TorchOneShot:
    """The one-shot all-reduce that torch has: bf16 and fp32 alone, and sums are rounded after every rank."""

    def __init__(self) -> None:
        from torch.distributed import _symmetric_memory

        device = torch.device("cuda", torch.cuda.current_device())
        self.group = dist.distributed_c10d._get_default_group().group_name
        self.buffer = _symmetric_memory.empty(max(SIZES) // 2, dtype=torch.bfloat16, device=device)
        _symmetric_memory.rendezvous(self.buffer, self.group)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.symm_mem.one_shot_all_reduce_copy(self.buffer[: len(x)], x, "sum", self.group)


def check_one_shot(calls: int = 300) -> dict[str, Any]:
    """The one-shot all-reduce against sums in the order of the ranks, bit for bit, eager and in a graph.

    Returns:
        How many calls there were and how many of them were wrong on some rank.
    """
    rank, wrong = dist.get_rank(), torch.zeros((), dtype=torch.int64, device="cuda")
    # What all ranks do, and what each does alone: its values, and when it comes.
    draw, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(rank)
    torch.cuda.manual_seed(rank)

    def expected(x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return sum(part.float() for part in parts).to(x.dtype)  # type: ignore[union-attr]

    graphs = []
    for call in range(calls):
        dtype = (torch.float16, torch.bfloat16, torch.float32)[call % 3]
        most = one_shot.MAX_BYTES // dtype.itemsize
        size = int(torch.randint(1, most + 1, (), generator=draw)) if call % 2 else 1024 * (1 + call % 32)
        x = torch.randn(size, device="cuda").to(dtype)
        torch.cuda._sleep(int(torch.randint(200_000, (), generator=own)))
        y = one_shot.all_reduce(x)
        wrong += (y != expected(x)).any()
        if call % 30 == 0:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                first = one_shot.all_reduce(x)
                y = one_shot.all_reduce(first)
            graphs.append((graph, x, y))
    for _ in range(20):
        for graph, x, y in graphs:
            x.normal_()
            torch.cuda._sleep(int(torch.randint(200_000, (), generator=own)))
            graph.replay()
            wrong += (y != expected(expected(x))).any()
    dist.all_reduce(wrong)
    return {"calls": calls + 40 * len(graphs), "wrong": int(wrong)}


@torch.no_grad()
def measure(names: Sequence[str], tokens: Sequence[int], with_one_shot: bool) -> dict[str, Any]:
    """Everything that one number of ranks can tell; runs on each of them."""
    report: dict[str, Any] = {"mlps": [], "parts": [], "collectives": []}
    world, has_gpu = dist.get_world_size(), torch.cuda.is_available()
    has_one_shot = with_one_shot and one_shot.prepare()
    if has_gpu:
        compile_ahead(names, tokens, (1, *MODELLED) if world == 1 else (world,))
    if has_one_shot:
        report["one_shot_check"] = check_one_shot()
    for name in names:
        for key, rows in measure_mlp(name, tokens, has_one_shot).items():
            report[key] += rows
    if has_gpu and world > 1:
        report["collectives"] = measure_collectives(has_one_shot)
    return report


def expected_floors(is_gated: bool, world: int) -> float:
    """The error that rounding to fp16 gives a result, in multiples of rounding the exact one once.

    Roundings are independent: their squares add up. The inner activation is rounded once, or, gated, as gate,
    silu(gate), up and their product; each rank's part of the result is, which makes one rounding of the whole
    together; and the sum is after each rank j of p that is added to it, j/p of the whole large.
    """
    return ((4 if is_gated else 1) + 1 + sum(j / world for j in range(2, world + 1))) ** 0.5


def failures(reports: dict[int, dict[str, Any]]) -> list[str]:
    """What is not as it should be."""
    found = []
    for world, report in reports.items():
        check = report.get("one_shot_check")
        if check and check["wrong"]:
            found.append(f"tp {world}: {check['wrong']} one-shot all-reduces are wrong")
        for row in report["mlps"]:
            allowed = MAX_ERROR * expected_floors((SHAPES | SMALL)[row["mlp"]].is_gated, world)
            for variant, result in row.items():
                if not isinstance(result, dict):
                    continue
                count = sum(result["collectives"].values())
                # All-gather and all-reduce, or the all-reduce alone.
                expected = 0 if world == 1 else 2 if variant == "naive" else 1
                if (
                    not result["error_in_floors"] <= allowed
                    or not result["same_on_all_ranks"]
                    or count != expected
                ):
                    found.append(f"{row['mlp']} tp {world} M={row['m']} {variant}: {result}")
    return found


def speedup(row: dict[str, Any], variant: str, mode: str) -> float:
    """Of a variant over naive."""
    return row["naive"][mode] / row[variant][mode]


def print_tables(report: dict[str, Any]) -> None:
    for row in report["mlps"]:
        variants = [name for name in ("aware", "one-shot") if name in row]
        cells = [
            f"{mode[:-3]} naive {row['naive'][mode]:6.1f} "
            + " ".join(
                f"{name} {row[name][mode]:6.1f} ({speedup(row, name, mode):.2f}x)" for name in variants
            )
            for mode in ("graph_us", "eager_us")
            if mode in row["naive"]
        ]
        counted = {name: row[name]["collectives"] for name in ("naive", *variants)}
        print(f"{row['mlp']} tp={row['tp']} M={row['m']}: " + "; ".join(cells), counted)
    for row in report["collectives"]:
        cells = [
            f"{name} {value['graph_us']:.1f}/{value['eager_us']:.1f}"
            for name, value in row.items()
            if isinstance(value, dict)
        ]
        print(f"tp={row['tp']} {row['bytes']} bytes, graph/eager us: " + "  ".join(cells))
    for row in report["model"].get("rows", []):
        measured = f", measured {row['measured']:.2f}x" if row["measured"] else ""
        print(f"model {row['mlp']} tp={row['tp']} M={row['m']}: {row['speedup']:.2f}x{measured}")
    for name, value in PAPER.items():
        ours = {
            f"{mode[:-3]} tp={row['tp']} M={row['m']}": speedup(row, "aware", mode)
            for row in report["mlps"]
            for mode in ("graph_us", "eager_us")
            if row["mlp"] == name and row["tp"] > 1 and mode in row["naive"]
        }
        if ours:
            best = max(ours, key=ours.__getitem__)
            print(f"{name}: up to {ours[best]:.2f}x ({best}); the paper: up to {value}x")


def main(
    tp: Annotated[str | None, typer.Option(help="Numbers of ranks; default 1, 2, 4, ... GPUs.")] = None,
    mlp: Annotated[str | None, typer.Option(help="Separated by commas; default all.")] = None,
    tokens: Annotated[str, typer.Option(help="Separated by commas.")] = TOKENS,
    with_one_shot: Annotated[bool, typer.Option(help="Measure the one-shot all-reduce, too.")] = True,
    json_file: JsonFile = None,
) -> None:
    gpus = torch.cuda.device_count()
    tp = tp or ",".join(str(1 << bit) for bit in range((gpus or 2).bit_length()))
    mlp = mlp or ",".join(SHAPES if gpus else SMALL)
    reports = {
        world: run_ranks(measure, world, mlp.split(","), [int(m) for m in tokens.split(",")], with_one_shot)
        for world in map(int, tp.split(","))
    }
    report: dict[str, Any] = {
        **about_this_run(f"python scripts/benchmark_tp.py --tp {tp} --mlp {mlp} --tokens {tokens}"),
        "gpus": gpus,
        "group_size": GROUP,
        "paper_up_to": PAPER,
        **{
            key: [row for part in reports.values() for row in part[key]]
            for key in ("mlps", "parts", "collectives")
        },
        "one_shot_check": {world: part.get("one_shot_check") for world, part in reports.items()},
    }
    report["model"] = predictions(report["mlps"], report["parts"], report["collectives"])
    write_report(report, json_file)
    print_tables(report)
    print({key: report[key] for key in ("device", "one_shot_check")})
    failed = failures(reports)
    print("\n".join(failed) or "all results are right")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    typer.run(main)
