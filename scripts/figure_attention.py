"""The tables about attention, each a block of the function's name."""

from collections.abc import Callable, Iterable
from typing import Any

from figures import block, read_results, source, table

# By what `benchmark_attention.py` calls them; a peer that was not there is left out.
_PREFILL = {
    "sdpa flash": "SDPA, flash, bf16",
    "sdpa cudnn": "SDPA, cuDNN, bf16",
    "fa3 bf16": "FlashAttention-3, bf16",
    "fa3 fp8 kernel": "FlashAttention-3, fp8, without quantizing",
    "fp8 kernel": "ours, fp8, without quantizing",
    "int8-fp8 kernel": "ours, int8-fp8, without quantizing",
    "fp8 all": "ours, fp8",
    "int8-fp8 all": "ours, int8-fp8",
    "sdpa cudnn, rope": "RoPE, then SDPA, cuDNN, bf16",
    "fp8 all, rope": "RoPE and ours, fp8",
    "int8-fp8 all, rope": "RoPE and ours, int8-fp8",
}
_DECODE = {
    "fp8 all": "fp8",
    "int8-fp8 all": "int8-fp8",
    "fp8 kernel": "fp8, attention alone",
    "int8-fp8 kernel": "int8-fp8, attention alone",
    "fa3 fp8 kernel": "FlashAttention-3, fp8, attention alone",
    "sdpa flash bf16": "SDPA, flash, bf16",
}
_KERNELS = {"attention_hopper": "Hopper kernel", "attention_triton": "portable kernel"}
_MODES = ("fp8", "int8-fp8")


def _measured(names: dict[str, str], rows: list[dict[str, Any]]) -> dict[str, str]:
    return {name: label for name, label in names.items() if any(name in row["us"] for row in rows)}


@block
def decode_attention() -> str:
    result = read_results("decode_attention")
    rows = [
        [
            f"batch {row['batch']}, {row['filled']} of {row['length']} keys",
            *(f"{row[f'rope+{name}'] - row['rope']:.1f} µs" for name in ("ours", "sdpa")),
            f"{row['memory']:.1f} µs",
        ]
        for row in result["times_us"]
    ]
    cases = result["random_cases"]
    errors = ", ".join(
        f"{name.removeprefix('torch.')} {value['worst_floors']:.2f} floors (SDPA "
        f"{value['worst_floors_of_sdpa']:.2f})"
        for name, value in cases.items()
        if isinstance(value, dict)
    )
    header = ["one token, 32 query and 8 KV heads of 128", "ours", "PyTorch's SDPA", "memory alone"]
    note = f"{cases['cases']} random problems, largest error: {errors}."
    return f"{table(header, rows)}\n\n{note} {source(result)}"


@block
def attention_summary() -> str:
    """What README shows: heads of 128, quantization included, beside the fastest attention in bf16."""
    result = read_results("attention")
    rows: list[list[object]] = []
    for row in result["prefill"]:
        if row["d"] == 128 and row["causal"]:
            best = max(row["tflops"].get(name, 0) for name in ("sdpa flash", "sdpa cudnn", "fa3 bf16"))
            what = f"causal prefill of {row['tokens']} tokens: TFLOP/s"
            rows.append([what, best, *(row["tflops"].get(f"{mode} all", "failed") for mode in _MODES)])
    for row in result["decode"]:
        times = (row["us"].get(name) for name in ("sdpa flash bf16", *(f"{mode} all" for mode in _MODES)))
        cells = ("failed" if us is None else f"{us:.0f}" for us in times)
        rows.append([f"one token, batch {row['batch']}, {row['keys']} keys: µs", *cells])
    header = ["32 query and 8 KV heads of 128", "fastest in bf16", *_MODES]
    return f"{table(header, rows)}\n\n{source(result)}"


@block
def attention_prefill() -> str:
    result = read_results("attention")
    parts = []
    for d in dict.fromkeys(row["d"] for row in result["prefill"]):
        columns = [row for row in result["prefill"] if row["d"] == d]
        sizes = [f"{'causal' if row['causal'] else 'full'}, {row['tokens']}" for row in columns]
        rows = [
            [label, *(row["tflops"].get(name, "failed") for row in columns)]
            for name, label in _measured(_PREFILL, columns).items()
        ]
        parts.append(table([f"TFLOP/s, heads of {d}", *sizes], rows))
    return "\n\n".join([*parts, source(result)])


@block
def attention_decode() -> str:
    result = read_results("attention")
    names = _measured(_DECODE, result["decode"])
    rows = [
        [
            f"batch {row['batch']}, {row['keys']} keys",
            *(
                f"{row['us'][name]:.1f} µs, {row['share_of_copy'][name]:.0%}"
                if name in row["us"]
                else "failed"
                for name in names
            ),
        ]
        for row in result["decode"]
    ]
    note = f"Copy bandwidth {result['copy_bandwidth_tb_per_s']} TB/s."
    return f"{table(['one token', *names.values()], rows)}\n\n{note} {source(result)}"


@block
def attention_errors() -> str:
    result = read_results("check_attention")
    cells = {(row["distribution"], row["mode"], row["kernel"]): row for row in result["distributions"]}
    names = list(dict.fromkeys(name for name, _, _ in cells))
    kernels = [kernel for kernel in _KERNELS if kernel in result]

    def errors(mode: str, kernel: str, kind: str = "error") -> list[str]:
        found = (cells.get((name, mode, kernel)) for name in names)
        return ["failed" if row is None else f"{row[kind]:.4f}" for row in found]

    rows = []
    for mode in _MODES:
        rows += [[f"{mode}, {_KERNELS[kernel]}", *errors(mode, kernel)] for kernel in kernels]
        rows.append([f"{mode}, reference", *errors(mode, kernels[-1], "reference")])
    random = {_KERNELS[kernel]: result[kernel]["random"] for kernel in kernels}
    checked = "; ".join(
        f"{cases['cases']} with the {label}, {cases['failed'] or 'none'} beyond what rounding allows"
        for label, cases in random.items()
    )
    header = ["relative L2 against float64", *names]
    return f"{table(header, rows)}\n\nRandom problems: {checked}. {source(result)}"


@block
def attention_long_context() -> str:
    result = read_results("check_attention")
    cells = {
        (row["kernel"], row["tokens"], row["mode"], row["value_mean"], row["keys"]): row
        for row in result["long_context"]
    }
    columns = sorted({key[3:] for key in cells})
    rows = []
    for kernel, tokens, mode in dict.fromkeys(key[:3] for key in cells):
        found = (cells.get((kernel, tokens, mode, *column)) for column in columns)
        rows.append(
            [
                f"{mode}, {_KERNELS[kernel]}, {tokens} {'queries' if tokens > 1 else 'query'}",
                *(
                    "failed" if row is None else f"{row['error']:.2%} ({row['emulated']:.2%})"
                    for row in found
                ),
            ]
        )
    header = ["relative L2 (of the emulation)", *(f"V ~ N({mean:.0f}, 1), {keys}" for mean, keys in columns)]
    return f"{table(header, rows)}\n\n{source(result)}"


@block
def attention_quality() -> str:
    """Perplexity with 8-bit attention of models whose weights are not quantized."""
    result = read_results("attention_quality")
    rows, titles = _by_model(result["models"].values(), lambda variant: _with_error(variant["over_baseline"]))
    perplexity = [f"perplexity {model['baseline_perplexity']:.2f}" for model in result["models"].values()]
    tokens = {model["tokens"] for model in result["models"].values()}
    note = f"Mean ± standard error of paired windows, {' / '.join(f'{n:,}' for n in tokens)} tokens."
    header = ["nats per token over bf16", *titles]
    return f"{table(header, [['bf16', *perplexity], *rows])}\n\n{note} {source(result)}"


@block
def attention_quality_gains() -> str:
    """What one kind of 8-bit attention loses less than another."""
    result = read_results("attention_quality")
    rows, titles = _by_model(
        result["models"].values(),
        lambda variant: _with_error(variant["gain"]) if "gain" in variant else None,
        lambda variant: f"{variant['attention']}, over {variant.get('beside')}",
    )
    return table(["gain in nats per token", *titles], rows)


def _by_model(
    models: Iterable[dict[str, Any]],
    cell: Callable[[dict[str, Any]], str | None],
    name: Callable[[dict[str, Any]], str] = lambda variant: variant["attention"],
) -> tuple[list[list[str | None]], list[str]]:
    """A row for every variant that has cells, and the models' titles."""
    columns = [{name(v): cell(v) for v in model["variants"]} for model in models]
    rows = [[key, *(column[key] for column in columns)] for key, first in columns[0].items() if first]
    return rows, [model["title"] for model in models]


def _with_error(difference: dict[str, float]) -> str:
    return f"{difference['nll']:+.4f} ± {difference['standard_error']:.4f}"


@block
def attention_generate() -> str:
    """Decoding steps of a whole model behind a long context, and the memory of its cache."""
    result = read_results("attention_generate")
    parts, memory = result["results"]["speed"], result["results"]["memory"]
    names = {"sdpa": "bf16 cache", "hadacore": "fp8", "hadacore-int8-fp8": "int8-fp8"}
    rows = []
    for batch in (1, 8):
        row = parts[f"batch_{batch}"]
        cells = []
        for name in names:
            faster = "" if name == "sdpa" else f", {row['speedup'][name]:.2f}x"
            cells.append(
                f"{row['ms_per_step'][name]:.2f} ms, {row['tokens_per_second'][name]:.0f} tok/s{faster}"
            )
        rows.append([f"batch {batch}", *cells])
    header = ["Llama-3-8B shapes, int4 weights, one token behind 32k", *names.values()]
    note = (
        f"A cache of {memory['tokens']} tokens takes {memory['bytes'] / 2**30:.2f} GiB, in bf16 "
        f"{memory['bf16_bytes'] / 2**30:.2f}."
    )
    return f"{table(header, rows)}\n\n{note} {source(result)}"
