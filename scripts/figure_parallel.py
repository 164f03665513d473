"""Tables of several GPUs, and of GPTQ's time."""

from typing import Any

from figures import block, read_results, source, table

_MODES = {"graph_us": "CUDA graph", "eager_us": "eager"}
_SIZE = 1024


def _speed(row: dict[str, Any], variant: str, mode: str) -> str:
    us = row[variant][mode]
    return f"{us:.0f} µs, {row['naive'][mode] / us:.2f}x"


@block
def tensor_parallel() -> str:
    """TP-aware MLPs beside the naive way, by tokens."""
    result = read_results("tp")
    rows = [
        [f"{row['mlp']}, {label}", row["m"], f"{row['naive'][mode]:.0f} µs"]
        + [_speed(row, variant, mode) for variant in ("aware", "one-shot")]
        for row in result["mlps"]
        if row["tp"] == result["gpus"]
        for mode, label in _MODES.items()
    ]
    header = [
        f"MLP on {result['gpus']} GPUs",
        "tokens",
        "gather, permute, split, all-reduce",
        "TP-aware: one all-reduce, NCCL's",
        "the same, ours",
    ]
    paper = ", ".join(f"{name} {ratio}x" for name, ratio in result["paper_up_to"].items())
    check = result["one_shot_check"][str(result["gpus"])]
    notes = (
        f"The paper reports up to {paper} on up to eight GPUs. Of {check['calls']} of our all-reduces "
        f"{check['wrong']} differ by a bit from sums in the order of ranks. {source(result)}"
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
        [f"{row['bytes'] // _SIZE} KiB"]
        + [
            f"{row[name]['graph_us']:.1f} / {row[name]['eager_us']:.0f} µs" if name in row else ""
            for name in names
        ]
        for row in result["collectives"]
    ]
    header = [f"{result['gpus']} GPUs, CUDA graph / eager", *names]
    return f"{table(header, rows)}\n\n{source(result)}"


@block
def multi_gpu() -> str:
    """Logits of several GPUs beside those of one."""
    result = read_results("multi_gpu_logits")
    rows = {(row["attention"], row["place"], row["form"]): row for row in result["logits"]["rows"]}
    places = {"ranks": "tensor parallelism", "auto": 'device_map="auto"'}
    cells = []
    for attention, place in dict.fromkeys(key[:2] for key in rows):
        bf16, int4 = (rows[attention, place, form] for form in ("bf16", "int4"))
        cells.append(
            [
                f"{places[place]}, {attention} attention",
                f"{bf16['relative_difference']:.1e}",
                f"{int4['relative_difference']:.1e}",
                f"{int4['same_tokens']} of {int4['tokens']}",
                f"{int4['clear_tokens_that_differ']} of {int4['clear_tokens']}",
            ]
        )
    header = [
        f"logits on {result['gpus']} GPUs from those on one, relative L2",
        "bf16 weights",
        "int4 weights",
        "same greedy token, int4",
        "clear tokens that differ",
    ]
    return f"{table(header, cells)}\n\n{source(result)}"


@block
def multi_gpu_speed() -> str:
    """Decoding of a whole model on one GPU and on several."""
    result = read_results("multi_gpu_70b")
    rows = [
        [
            f"{place.replace('tp', 'tensor parallel,')} GPUs, {case}"
            if place != "tp 1"
            else f"one GPU, {case}",
            f"{run['memory_gib']:.1f} GiB",
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup_over_tp_1']:.2f}x",
            f"{row['replay_ms']:.2f} ms",
            f"{row['collectives_share']:.1%}",
        ]
        for place, run in result["speed"]["results"].items()
        for case, row in run.items()
        if isinstance(row, dict)
    ]
    header = [
        f"{result['shape']}, int4; attention",
        "weights per GPU",
        "tokens/s",
        "over one GPU",
        "CUDA graph of a step",
        "share of all-reduces",
    ]
    return f"{table(header, rows)}\n\n{source(result)}"


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
