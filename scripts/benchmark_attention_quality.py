"""What 8-bit attention costs in perplexity on real models: without rotation, with it, with the K constant.

    python scripts/benchmark_attention_quality.py --data DATA --json scripts/results/attention_quality.json

DATA holds wikipedia_eval.txt and wikipedia_calibration.txt. Weights and everything but attention are fp32.
All kinds of attention read the same bf16 queries, keys and values; the baseline is PyTorch's on them. The
models are dequantized GGUF files.

The K constant is the mean of the window's keys, as a prompt of 1024 tokens gives it; that of its first
tokens, as a short prompt does, which all later tokens have to do with; or that of other texts' keys.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from quality_report import about_quality, as_json, merge_report
from real_models import MODELS, export_checkpoint
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from hf_hadacore.attention.functional import quantized_attention
from hf_hadacore.attention.interface import interval_mask
from hf_hadacore.evaluation.perplexity import Perplexity, encode, paired_difference, perplexity
from hf_hadacore.kernels.key_mean import key_mean

NAME = "attention-benchmark"
TEXT, CALIBRATION = "wikipedia_eval.txt", "wikipedia_calibration.txt"
CONTEXT = 1024
WINDOWS = {"cuda": 100, "cpu": 20}


# Calibration, for the mean of other texts' keys.
CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 64, 512


class Variant(NamedTuple):
    """A kind of attention.

    Attributes:
        name: for people.
        mode: of `quantized_attention`; None for PyTorch's.
        rotate: as there.
        constant: "own" is the mean of all keys, a number that of so many first ones, "calibrated" that of
            another text; None for none.
        beside: the name of the one that it is compared with, besides the baseline.
    """

    name: str
    mode: str | None
    rotate: bool = True
    constant: str | int | None = "own"
    beside: str | None = None


BASELINE = Variant("bf16", None)


def with_constants(mode: str) -> list[Variant]:
    """A mode with rotation, and every K constant."""
    name = f"{mode}, rotation, K constant"
    return [
        Variant(name, mode, beside="fp8, no rotation"),
        Variant(f"{name} of the first token", mode, constant=1, beside=name),
        Variant(f"{name} of the first 16 tokens", mode, constant=16, beside=name),
        Variant(f"{name} of other texts", mode, constant="calibrated", beside=name),
    ]


VARIANTS = [
    Variant("fp8, no rotation", "fp8", rotate=False, constant=None),
    Variant("fp8, rotation", "fp8", constant=None, beside="fp8, no rotation"),
    Variant("fp8, no rotation, K constant", "fp8", rotate=False, beside="fp8, no rotation"),
    *with_constants("fp8"),
    *with_constants("int8-fp8"),
]


class Inputs(NamedTuple):
    """What an attention layer reads.

    Attributes:
        layer: its index.
        query, key, value: bf16 ``[B, Hq or Hkv, L, D]``.
        scale: of the logits.
        window: keys that a query sees; None for all before it.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    window: int | None


Attention = Callable[[Inputs], torch.Tensor]


def use(attention: Attention) -> None:
    """Let models with the attention implementation `NAME` compute that."""

    def forward(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        read = (query.bfloat16(), key.bfloat16(), value.bfloat16())
        output = attention(Inputs(module.layer_idx, *read, scaling, sliding_window))
        return output.transpose(1, 2).bfloat16().float(), None

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, interval_mask)


def exact(inputs: Inputs) -> torch.Tensor:
    """PyTorch's, with products and sums in fp32, as on a GPU."""
    query, key, value = (x.float() for x in (inputs.query, inputs.key, inputs.value))
    n = torch.arange(query.shape[2], device=query.device)
    seen = n <= n[:, None]
    if inputs.window is not None:
        seen = seen & (n > n[:, None] - inputs.window)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=inputs.scale, enable_gqa=True
    )


def quantized(variant: Variant, calibrated: Mapping[int, torch.Tensor]) -> Attention:
    """8-bit attention.

    Args:
        variant: of `VARIANTS`.
        calibrated: fp32 ``[Hkv, D]``, by layer.
    """
    assert variant.mode is not None
    mode = variant.mode

    def attention(inputs: Inputs) -> torch.Tensor:
        k_mean: torch.Tensor | bool | None = None
        if variant.constant is None:
            k_mean = False
        elif isinstance(variant.constant, int):
            k_mean = key_mean(inputs.key[:, :, : variant.constant])
        elif variant.constant == "calibrated":
            k_mean = calibrated[inputs.layer]
        return quantized_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            is_causal=True,
            scale=inputs.scale,
            mode=mode,
            rotate=variant.rotate,
            k_mean=k_mean,
            window=inputs.window,
        )

    return attention


def mean_keys(model: PreTrainedModel, ids: torch.Tensor, bos: int | None) -> dict[int, torch.Tensor]:
    """The mean of a text's keys, fp32 ``[Hkv, D]`` by layer."""
    means: dict[int, list[torch.Tensor]] = {}

    def attention(inputs: Inputs) -> torch.Tensor:
        means.setdefault(inputs.layer, []).append(key_mean(inputs.key)[0])
        return exact(inputs)

    use(attention)
    perplexity(model, ids, bos=bos, context=CALIBRATION_LENGTH, windows=CALIBRATION_WINDOWS)
    return {layer: torch.stack(found).mean(0) for layer, found in means.items()}


def measure(name: str, data: Path, device: str, windows: int, work: Path) -> dict[str, Any]:
    """Every variant on one model."""
    folder = export_checkpoint(name, work / name)
    use(exact)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": device}, attn_implementation=NAME
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, bos = encode(tokenizer, (data / TEXT).read_text("utf-8"))
    calibrated = mean_keys(model, *encode(tokenizer, (data / CALIBRATION).read_text("utf-8")))

    def run(attention: Attention) -> Perplexity:
        use(attention)
        return perplexity(model, ids, bos=bos, context=CONTEXT, windows=windows, progress=True)

    results = {BASELINE.name: run(exact)}
    rows = []
    for variant in VARIANTS:
        results[variant.name] = result = run(quantized(variant, calibrated))
        row: dict[str, Any] = {
            "attention": variant.name,
            "perplexity": round(result.perplexity, 4),
            "over_baseline": as_json(paired_difference(result, results[BASELINE.name])),
        }
        if variant.beside is not None:
            gain = as_json(paired_difference(results[variant.beside], result))
            row |= {"beside": variant.beside, "gain": gain}
        rows.append(row)
        print(f"{name}: {row}", flush=True)
    config = model.config
    return {
        "title": MODELS[name].title,
        "origin": "dequantized GGUF",
        "head_dim": getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        "heads": [config.num_attention_heads, config.num_key_value_heads],
        "tokens": results[BASELINE.name].token_nll.numel(),
        "baseline_perplexity": round(results[BASELINE.name].perplexity, 4),
        "variants": rows,
    }


def main(
    data: Annotated[Path, typer.Option(help="Folder of the text files.")],
    model: Annotated[list[str] | None, typer.Option(help=f"Of {list(MODELS)}; repeatable.")] = None,
    windows: Annotated[
        int | None, typer.Option(help="Windows of 1024 tokens; default: 100 on a GPU, else 20.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    work: Annotated[Path, typer.Option(help="Where checkpoints are exported to.")] = Path("demo_output"),
    threads: Annotated[int | None, typer.Option(help="Of PyTorch.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where to write the results; other models' are kept.")
    ] = None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    windows = windows or WINDOWS[torch.device(device).type]
    command = f"python scripts/benchmark_attention_quality.py --data DATA --windows {windows}"
    report = about_quality(command, device, TEXT, CONTEXT)
    for name in model or list(MODELS):
        start = time.perf_counter()
        measured = measure(name, data, device, windows, work)
        report["models"][name] = measured | {"seconds": round(time.perf_counter() - start)}
        if json_file is not None:
            merge_report(report, json_file)


if __name__ == "__main__":
    typer.run(main)
