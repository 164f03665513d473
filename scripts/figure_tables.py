"""The tables of README and docs, each a block of the function's name."""

from typing import Any

from figures import block, read_results, source, table


def _with_error(difference: dict[str, float]) -> str:
    return f"{difference['nll']:+.3f} ± {difference['standard_error']:.3f}"


# What README shows of the recipes; docs/benchmarks.md has all.
MAIN_RECIPES = (
    *("min-max", "searched", "GPTQ, act-order", "GPTQ, act-order, rotated"),
    *("bf16, fp8 attention", "bf16, int8-fp8 attention"),
)


@block
def quality_summary() -> str:
    result = read_results("quality")
    models = list(result["models"].values())
    by_model = [{recipe["recipe"]: recipe for recipe in model["recipes"]} for model in models]
    rows: list[list[object]] = []
    for name, recipe in by_model[0].items():
        if not any(
            name in (main, f"asymmetric, group {recipe['group_size']}, {main}") for main in MAIN_RECIPES
        ):
            continue
        cells = [_with_error(found[name]["over_baseline"]) if name in found else "" for found in by_model]
        rows.append([name, f"{recipe['bits_per_weight']:.2f}", *cells])
    header = ["nats per token over bf16", "bits per weight", *(model["title"] for model in models)]
    tokens = " / ".join(f"{model['tokens']:,}" for model in models)
    baselines = " / ".join(f"{model['baseline_perplexity']:.2f}" for model in models)
    return (
        f"{table(header, rows)}\n\nMean ± standard error of paired windows, {tokens} tokens; bf16 perplexity "
        f"{baselines}. {source(result)}"
    )


@block
def quality() -> str:
    return _quality("quality")


@block
def quality_all_recipes() -> str:
    return _quality("quality_calibration_128x1024")


@block
def quality_gemma() -> str:
    return _quality("quality_gemma")


@block
def quality_peers() -> str:
    """Other quantizers with the same calibration tokens."""
    result = read_results("quality_peers")
    parts = []
    for model in result["models"].values():
        rows = [
            [
                f"{row['quantizer']} {row['version']}: {row['method']}",
                f"{row['perplexity']:.2f}",
                _with_error(row["over_baseline"]),
                _with_error(row["over_ours"]) if row.get("over_ours") else "",
                f"{row['kl']['value']:.3f}",
            ]
            for row in model["recipes"]
            if not row.get("failed")
        ]
        header = [f"{model['title']}, group 64, asymmetric", "perplexity", "nats per token over bf16"]
        parts.append(table([*header, "over ours, first line", "KL"], rows))
    return "\n\n".join([*parts, f"Mean ± standard error of paired windows. {source(result)}"])


def _quality(name: str) -> str:
    result = read_results(name)
    parts = []
    for model in result["models"].values():
        minmax = {r["group_size"]: r["over_baseline"] for r in model["recipes"] if r["method"] == "min-max"}
        rows: list[list[object]] = [["bf16", 16, f"{model['baseline_perplexity']:.2f}", "", "", "", ""]]
        for recipe in model["recipes"]:
            loss = recipe["over_baseline"]
            share = f"{loss['nll'] / minmax[recipe['group_size']]['nll']:.0%}" if recipe["method"] else ""
            rows.append(
                [
                    recipe["recipe"],
                    f"{recipe['bits_per_weight']:.2f}",
                    f"{recipe['perplexity']:.2f}",
                    _with_error(loss),
                    share,
                    f"{recipe['kl']['value']:.3f}",
                    f"{recipe['top1_agreement']['value']:.1%}",
                ]
            )
        title = f"{model['title']} ({model['origin']}; {model['tokens']:,} tokens)"
        header = [
            title,
            "bits per weight",
            "perplexity",
            "nats per token over bf16",
            "of min-max's",
            "KL",
            "top-1",
        ]
        parts.append(table(header, rows))
        parts += [
            f"An int4 output head costs {_with_error(recipe['cost_of_int4_head'])} nats per token."
            for recipe in model["recipes"]
            if "cost_of_int4_head" in recipe
        ]
    return "\n\n".join([*parts, f"Mean ± standard error of paired windows. {source(result)}"])


@block
def calibration_lengths() -> str:
    """Calibration tokens as fewer or more samples."""
    lengths = {
        "128 samples of 1024": read_results("quality_calibration_128x1024"),
        "256 of 512": read_results("quality_calibration_256x512"),
        "512 of 256": read_results("quality_calibration_512x256"),
        "480 of 512, nearly twice the tokens": read_results("quality"),
    }
    rows: list[list[object]] = []
    for name, model in lengths["128 samples of 1024"]["models"].items():
        for group_size in (64, 128):
            for recipe in ("GPTQ, act-order", "GPTQ, act-order, rotated"):
                wanted = f"asymmetric, group {group_size}, {recipe}"
                cells = [_loss(result["models"].get(name), wanted) for result in lengths.values()]
                rows.append([f"{model['title']}, group {group_size}, {recipe}", *cells])
    parts = [table(["nats per token over bf16", *lengths], rows)]
    return "\n\n".join([*parts, *(source(result) for result in lengths.values())])


def _loss(model: dict[str, Any] | None, recipe: str) -> str:
    rows = model["recipes"] if model else []
    return next((_with_error(row["over_baseline"]) for row in rows if row["recipe"] == recipe), "")


@block
def cpu_speed() -> str:
    result = read_results("cpu_speed")
    names = {"decode": "decode, batch 1", "prefill": "prefill of"}
    rows = [
        [
            f"{model['model']}, {' '.join(names.get(part, part) for part in task.split('_'))}",
            *(f"{model['tokens_per_second'][kind][task]:.1f}" for kind in ("bf16", "int4")),
            f"{ratio:.2f}x",
        ]
        for model in result["models"]
        for task, ratio in model["int4_over_bf16"].items()
    ]
    header = [f"tokens per second, group {result['group_size']}", "bf16", "int4", "int4 / bf16"]
    return f"{table(header, rows)}\n\n{result['isa']}; {source(result)}"


@block
def gpu() -> str:
    portable, hopper = read_results("check_w4a16"), read_results("check_w4a16_tiled")
    rows = []
    for name, result in (("portable Triton kernel", portable), ("Hopper kernels", hopper)):
        random, repeats = result["random_shapes"], result["repeats"]
        worst = max(random["worst_error_in_floors"], *result["beyond_2_31_elements"].values())
        same = f"{repeats['repeats']}, {'the same bits' if repeats['bit_identical'] else 'DIFFERENT bits'}"
        rows.append([name, random["cases"], f"{worst:.2f} floors", same])
    model = read_results("check_model_gpu")
    memory = [f"{model['results'][kind]['memory_gib']} GiB in {kind}" for kind in ("bf16", "int4")]
    header = ["against float64", "random problems", "largest error", "repeats"]
    sources = "\n\n".join(source(result) for result in (portable, hopper))
    return f"{table(header, rows)}\n\n{sources}\n\n{model['model']}: {', '.join(memory)}. {source(model)}"


@block
def w4a16_summary() -> str:
    """A decoding step's products beside every peer that was measured in the same run."""
    result = read_results("w4a16")
    peers = {
        "cuBLAS, bf16": "cublas_bf16",
        "tinygemm": "tinygemm_bf16",
        "Humming": "humming_fp16",
        "ours": "ours_fp16",
    }
    cells = {(row["n"], row["k"], row["m"]): row for row in result["rows"]}
    rows: list[list[object]] = []
    for n, k in ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192)):
        for m in (1, 16):
            row = cells[n, k, m]
            us = [f"{row['us'][name]:.1f}" if name in row["us"] else "" for name in peers.values()]
            share = row["floor_us"] / row["us"]["ours_fp16"]
            rows.append([f"{n} x {k}, {m} token{'s' * (m > 1)}", *us, f"{share:.0%}"])
    header = ["µs of an int4 product, group 128", *peers, "ours, of copy bandwidth"]
    return f"{table(header, rows)}\n\n{source(result)}"


@block
def w4a16_speed() -> str:
    result = read_results("w4a16")
    cells = {(row["n"], row["k"], row["m"]): row for row in result["rows"]}
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in result["rows"]))
    tokens = sorted({row["m"] for row in result["rows"]})
    few, many = [m for m in tokens if m <= 64], [m for m in tokens if m > 64]
    skinny = table(
        ["few tokens: µs, share of the floor, times as fast as the best peer", *(f"M = {m}" for m in few)],
        [[f"{n}x{k}", *(_beside_peers(cells[n, k, m]) for m in few)] for n, k in shapes],
    )
    wide = table(
        ["many tokens: µs, times as fast as cuBLAS on bf16 weights", *(f"M = {m}" for m in many)],
        [[f"{n}x{k}", *(_beside_cublas(cells[n, k, m]) for m in many)] for n, k in shapes],
    )
    with_zeros = table(
        ["asymmetric weights: µs, times as long as symmetric ones", *(f"M = {m}" for m in tokens)],
        [[f"{n}x{k}", *(_with_zeros(cells[n, k, m]) for m in tokens)] for n, k in shapes],
    )
    worst = max(
        error for row in result["rows"] for name, error in row["error_in_floors"].items() if _is_ours(name)
    )
    peers = sorted({name for row in result["rows"] for name in row["us"] if not _is_ours(name)})
    notes = (
        f"Ours in fp16. Copy bandwidth {result['copy_bandwidth_tb_per_s']} TB/s. Peers: {', '.join(peers)}. "
        f"Our largest error: {worst:.2f} floors. {source(result)}"
    )
    return f"{skinny}\n\n{wide}\n\n{with_zeros}\n\n{notes}"


def _is_ours(name: str) -> bool:
    return name.startswith("ours")


def _beside_peers(row: dict[str, Any]) -> str:
    ours = row["us"]["ours_fp16"]
    best = min(us for name, us in row["us"].items() if not _is_ours(name))
    return f"{ours:.1f}, {row['floor_us'] / ours:.0%}, {best / ours:.2f}x"


def _beside_cublas(row: dict[str, Any]) -> str:
    ours = row["us"]["ours_fp16"]
    return f"{ours:.0f}, {row['us']['cublas_bf16'] / ours:.2f}x"


def _with_zeros(row: dict[str, Any]) -> str:
    ours = row["us"]["ours_with_zeros_fp16"]
    return f"{ours:.1f}, {ours / row['us']['ours_fp16']:.2f}x"


@block
def w4a16_gemlite() -> str:
    """GemLite beside ours, in a run of its own: it tunes for minutes what the other run has in shapes."""
    result = read_results("w4a16_gemlite")
    rows = [
        [f"{row['n']}x{row['k']}", row["m"]]
        + [
            f"{us:.1f} µs, {row['floor_us'] / us:.0%}, {row['error_in_floors'][name]:.1f}"
            for name, us in row["us"].items()
        ]
        for row in result["rows"]
    ]
    header = ["N x K", "M", "ours: time, share of the floor, error in floors", "GemLite"]
    return f"{table(header, rows)}\n\n{source(result)}"


@block
def split_k() -> str:
    result = read_results("w4a16")
    gains = result["split_k_gain"]
    sizes = sorted({row["size"] for row in result["split_k"]})
    best = {
        size: [
            row["us_by_split_k"]["1"] / min(row["us_by_split_k"].values())
            for row in result["split_k"]
            if row["size"] == size
        ]
        for size in sizes
    }
    header = ["N = K", *map(str, sizes)]
    means = ["best split over none, mean of M = 1...16", *(f"{sum(r) / len(r):.2f}x" for r in best.values())]
    fixed = ", ".join(f"{k} programs {gain:+.0%}" for k, gain in gains.items() if k != "best")
    mean = f"Mean over all: best split {gains['best']:+.0%}; {fixed}."
    return f"{table(header, [means])}\n\n{mean} {source(result)}"


@block
def offline_memory() -> str:
    result = read_results("offline_memory")
    header = [result["shapes"], "checkpoint", "largest layer", "peak memory", "in largest layers", "time"]
    rows = [
        [
            f"{run['layers']} layers" + (", int4 head" if run["quantize_lm_head"] else ""),
            f"{run['source_bytes'] / 1e9:.2f} GB",
            f"{run['largest_layer']['bytes'] / 1e9:.2f} GB",
            f"{run['peak_bytes'] / 1e9:.2f} GB",
            f"{run['peak_in_largest_layers']:.2f}",
            f"{run['seconds']:.0f} s",
        ]
        for run in result["runs"]
    ]
    baseline = f"{result['baseline_peak_bytes'] / 1e9:.2f} GB"
    start = f"{baseline} of the peak are Python and torch; the multiple counts the rest."
    return f"{table(header, rows)}\n\n{start} {source(result)}"


@block
def generate_speed() -> str:
    return _generate_speed("generate")


@block
def generate_speed_experts() -> str:
    return _generate_speed("generate_experts")


def _generate_speed(name: str) -> str:
    result = read_results(name)
    names = {
        "bf16-eager": "bf16, as transformers runs it",
        "bf16-graphs": "bf16, CUDA graphs of this package",
    }
    names |= {"int4-eager": "int4, without graphs", "int4-graphs": "int4"}
    rows = []
    for part in [part for part in names if part in result["results"]]:
        measured = result["results"][part]
        batches = [value for key, value in measured.items() if key.startswith("batch_")]
        rows.append(
            [
                names[part],
                f"{measured['memory_gib']:.1f} GiB",
                *(f"{one['tokens_per_second']:.0f} tok/s, {one['ms_per_step']:.2f} ms" for one in batches),
                *(f"{one['time_to_first_token_ms']:.0f} ms" for one in batches),
            ]
        )
    sizes = [
        key.removeprefix("batch_") for key in result["results"]["int4-graphs"] if key.startswith("batch_")
    ]
    header = [result["model"], "weights", *(f"decode, batch {size}" for size in sizes)]
    header += [f"first token, batch {size}" for size in sizes]
    first = result["results"]["int4-graphs"][f"batch_{sizes[0]}"]["first_call_seconds"]
    note = (
        f"Prompt of {result['prompt_tokens']} tokens, greedy. The first call after loading took "
        f"{first:.1f} s, compilation included."
    )
    return f"{table(header, rows)}\n\n{note} {source(result)}"


def _products_of_experts(result: dict[str, Any]) -> str:
    """How right the products were."""
    products = result["products"]
    worst = max(products["worst_error_in_floors"], *products["models_error_in_floors"].values())
    return f"{products['cases']} random problems, largest error {worst:.2f} floors. {source(result)}"


@block
def experts_speed() -> str:
    result = read_results("experts")
    rows = [
        [
            row["tokens"],
            row["distinct_experts"],
            f"{row['us']['int4']:.1f} µs",
            f"{row['share_of_floor']:.0%}",
            f"{row['products_share_of_floor']:.0%}",
            f"{row['us']['bf16 grouped_mm']:.1f} µs",
            f"{row['us']['bf16 batched_mm']:.1f} µs",
        ]
        for row in result["decoding"]
    ]
    header = ["tokens", "experts read", "int4", "share of the floor", "its products alone"]
    header += ["bf16 grouped_mm", "bf16 batched_mm"]
    return f"{table(header, rows)}\n\n{_products_of_experts(result)}"


@block
def experts_prefill() -> str:
    result = read_results("experts")["prefill"]
    rows = [
        [
            row["tokens"],
            f"{row['us']['int4']:.0f} µs",
            f"{row['us']['bf16 grouped_mm']:.0f} µs",
            f"{row['times_faster_than_bf16']:.2f}x",
            f"{row['products_tflop_per_s']:.0f}",
            f"{row['us']['int4, eager']:.0f} µs",
            f"{row['times_faster_than_loop']:.1f}x",
        ]
        for row in result["times"]
    ]
    header = ["tokens", "int4", "bf16 grouped_mm", "bf16 / int4", "TFLOP/s of the int4 products"]
    header += ["int4 without a graph", "loop over experts / int4"]
    return f"{table(header, rows)}\n\n{_products_of_experts(result)}"
