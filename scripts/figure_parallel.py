"""Tables of several GPUs, and of GPTQ's time."""

from typing import Any

from figures import block, read_results, source, table

_MODES = ("graph_us", "eager_us")
_KIB = 1024
_PLACES = {"ranks": "tensor parallelism", "spread": "layers spread by device_map"}


def _times(row: dict[str, Any], variant: str) -> str:
    """In a CUDA graph and eagerly, and how much faster than the naive way."""
    us = " / ".join(f"{row[variant][mode]:.0f}" for mode in _MODES)
    if variant == "naive":
        return f"{us} µs"
    gains = " / ".join(f"{row['naive'][mode] / row[variant][mode]:.2f}x" for mode in _MODES)
    return f"{us} µs, {gains}"


@block
def tensor_parallel() -> str:
    """TP-aware MLPs beside the naive way, by ranks and tokens."""
    result = read_results("tp")
    rows = [
        [
            row["mlp"],
            row["tp"],
            row["m"],
            *(_times(row, variant) for variant in ("naive", "aware", "one-shot")),
        ]
        for row in sorted(result["mlps"], key=lambda row: (row["mlp"], row["tp"], row["m"]))
        if row["tp"] > 1
    ]
    header = [
        "MLP, CUDA graph / eager",
        "GPUs",
        "tokens",
        "gather, permute, split, all-reduce",
        "TP-aware: one all-reduce, NCCL's",
        "the same, ours",
    ]
    paper = ", ".join(f"{name} {ratio}x" for name, ratio in result["paper_up_to"].items())
    checks = [check for check in result["one_shot_check"].values() if check]
    calls, wrong = (sum(check[key] for check in checks) for key in ("calls", "wrong"))
    notes = (
        f"The paper reports up to {paper} on up to eight GPUs. Of {calls} of our all-reduces {wrong} differ "
        f"by a bit from sums in the order of ranks. {source(result)}"
    )
    return f"{table(header, rows)}\n\n{notes}"


@block
def tensor_parallel_model() -> str:
    """What the measured parts predict for other numbers of ranks; named as a model."""
    result = read_results("tp")
    rows = result["model"]["rows"]
    ranks = sorted({row["tp"] for row in rows})
    names = list(dict.fromkeys((row["mlp"], row["m"]) for row in rows))
    by_key = {(row["mlp"], row["m"], row["tp"]): row for row in rows}

    def cell(row: dict[str, Any]) -> str:
        measured = f" (measured {row['measured']:.2f}x)" if row["measured"] else ""
        return f"{row['speedup']:.2f}x{measured}"

    header = ["model of the speed-up over naive, CUDA graphs", "tokens", *(f"{n} ranks" for n in ranks)]
    cells = [[mlp, m, *(cell(by_key[mlp, m, n]) for n in ranks)] for mlp, m in names]
    return f"{table(header, cells)}\n\n{source(result)}"


@block
def collectives() -> str:
    """All-reduces and all-gathers alone."""
    result = read_results("tp")
    names = [name for name, value in result["collectives"][0].items() if isinstance(value, dict)]
    rows = [
        [f"{row['bytes'] // _KIB} KiB", row["tp"]]
        + [
            f"{row[name]['graph_us']:.1f} / {row[name]['eager_us']:.0f} µs" if name in row else ""
            for name in names
        ]
        for row in result["collectives"]
    ]
    return f"{table(['CUDA graph / eager', 'GPUs', *names], rows)}\n\n{source(result)}"


@block
def multi_gpu() -> str:
    """Logits of several GPUs beside those of one."""
    results = [read_results(name) for name in ("multi_gpu_logits", "multi_gpu_logits_4")]
    cells = [
        [
            f"{_PLACES[int4['place']]}, {int4['attention']} attention",
            result["gpus"],
            f"{bf16['relative_difference']:.1e}",
            f"{int4['relative_difference']:.1e}",
            f"{int4['same_tokens']} of {int4['tokens']}",
            f"{int4['clear_tokens_that_differ']} of {int4['clear_tokens']}",
        ]
        for result in results
        for bf16, int4 in _pairs(result["logits"]["rows"])
    ]
    header = [
        "logits from those of one GPU, relative L2",
        "GPUs",
        "bf16 weights",
        "int4 weights",
        "same greedy token, int4",
        "clear tokens that differ",
    ]
    return "\n\n".join([table(header, cells), *map(source, results)])


def _pairs(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """bf16's row and int4's of each attention and place."""
    by_key = {(row["attention"], row["place"], row["form"]): row for row in rows if row["place"] in _PLACES}
    return [(by_key[*key, "bf16"], by_key[*key, "int4"]) for key in dict.fromkeys(key[:2] for key in by_key)]


@block
def multi_gpu_speed() -> str:
    """Decoding of whole models on one GPU and on several."""
    names = ("multi_gpu_70b", "multi_gpu_70b_auto", "multi_gpu_8b")
    return "\n\n".join(_speed_table(read_results(name)) for name in names)


def _speed_table(result: dict[str, Any]) -> str:
    rows = [
        [
            place.removeprefix("tp "),
            case.removesuffix(" batch 1"),
            f"{row['peak_memory_gib']:.1f} GiB",
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup_over_tp_1']:.2f}x",
            # device_map="auto" has no graph.
            f"{row['replay_ms']:.2f} ms" if "replay_ms" in row else "",
            f"{row['collectives_share']:.1%}" if "replay_ms" in row else "",
        ]
        for place, run in result["speed"]["results"].items()
        for case, row in run.items()
        if isinstance(row, dict)
    ]
    header = [
        f"{result['shape']}, int4, batch 1: GPUs",
        "attention",
        "memory per GPU",
        "tokens/s",
        "over one GPU",
        "CUDA graph of a step",
        "share of all-reduces",
    ]
    return f"{table(header, rows)}\n\n{source(result)}"


@block
def multi_gpu_summary() -> str:
    """How decoding grows with the GPUs, in tokens/s."""
    results = [read_results(name) for name in ("multi_gpu_70b", "multi_gpu_8b")]
    rows = [
        [
            f"{result['shape']}, {place.removeprefix('tp ')} GPU{'s' * (place != 'tp 1')}",
            *(
                f"{row['tokens_per_second']:.0f} tok/s, {row['speedup_over_tp_1']:.2f}x" if row else ""
                for row in (run.get(f"{kind}bf16 batch 1") for kind in ("", "one-shot "))
            ),
            f"{run['bf16 batch 1']['peak_memory_gib']:.1f} GiB",
        ]
        for result in results
        for place, run in result["speed"]["results"].items()
        if place.startswith("tp ")
    ]
    header = [
        "int4, batch 1, random weights",
        "NCCL's all-reduce",
        "`use_one_shot_all_reduce`",
        "memory per GPU",
    ]
    return "\n\n".join([table(header, rows), *map(source, results)])


@block
def gptq_time() -> str:
    """Time and memory of GPTQ for an 8B model."""
    result = read_results("gptq")
    rows = [
        [
            f"GPTQ, act-order {run['act_order']}",
            f"{run['model_of_32_layers_s'] / 60:.1f} min",
            f"{run['device_peak_gb']:.1f} GB",
            f"{run['host_peak_gb']:.1f} GB",
        ]
        for run in result["runs"]
        if not run["with_parts"]
    ]
    header = [
        f"{result['shapes']}; {result['samples']} x {result['sequence_length']} tokens",
        "32 layers, scaled",
        "peak on the GPU",
        "peak on the host",
    ]
    return f"{table(header, rows)}\n\n{source(result)}"
