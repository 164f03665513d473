"""How fast is 8-bit attention, beside SDPA in bf16 and FlashAttention-3?

    python scripts/benchmark_attention.py --json scripts/results/attention.json

Prefill: 16384 tokens in all, 32 heads of queries and 8 of keys, from bf16 `[B, S, H, D]` to bf16, in TFLOP/s
(4 B H S^2 D floating-point operations, half of it if causal). "kernel" is the attention alone on 8-bit
inputs; "all" starts from bf16 and has the mean of K, rotation and quantization in it. With "rope" rotary
embeddings come first, in ours within the pass that quantizes, with a K constant from before. Decode: one
token on an 8-bit cache, "all" with rotating and quantizing Q, K and V and storing K and V ("quantize" is that
alone), as the share of a copy's bandwidth at which K and V are read. Caches rotate out of L2. Times are
medians of CUDA-graph replays. FlashAttention-3 is timed if `fa3_fwd` can be imported; its 8-bit inputs are
made beforehand.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from gpu_processes import in_processes
from gpu_report import JsonFile, about_this_run, require_gpu, write_report
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_hadacore import quantized_attention, rotate_quantize
from hf_hadacore.kernels import attention
from hf_hadacore.kernels.attention import BLOCK_SIZE, attention_8bit
from hf_hadacore.kernels.measure import ROTATED_BYTES, copy_bandwidth, graph_time
from hf_hadacore.kernels.quantize_step import quantize_step_into_cache
from hf_hadacore.kernels.rope import rope

TOKENS = 16384
HEADS, KEY_HEADS = 32, 8
PREFILLS = (1024, 4096, 16384)
HEAD_DIMS = (128, 64)
DECODES = [(batch, keys) for batch in (1, 8) for keys in (4096, 16384, 65536)]
E4M3 = torch.float8_e4m3fn
DTYPES = {"fp8": E4M3, "int8-fp8": torch.int8}
_REPEATS = 10

Call = Callable[[], Any]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_inputs(batch: int, queries: int, keys: int, d: int) -> Inputs:
    """bf16 q, k and v ``[B, H, S, D]``, stored as models do."""

    def randn(tokens: int, heads: int) -> torch.Tensor:
        x = torch.randn(batch, tokens, heads, d, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2)

    return randn(queries, HEADS), randn(keys, KEY_HEADS), randn(keys, KEY_HEADS)


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend, is_causal: bool
) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)


def has_fa3() -> bool:
    try:
        importlib.import_module("fa3_fwd._C")
    except ImportError:
        return False
    return True


def fa3(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, is_8bit: bool = False, splits: int = 1
) -> Call:
    """FlashAttention-3; its 8-bit scales are per sequence and key head, here not of the data."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    options: dict[str, Any] = {}
    if is_8bit:
        # N(0, 1) ends before 7.
        scale = torch.full((q.shape[0], KEY_HEADS), 7 / 448, device="cuda")
        q, k, v = ((x.float() * (448 / 7)).clamp(-448, 448).to(E4M3) for x in (q, k, v))
        options = dict(q_descale=scale, k_descale=scale, v_descale=scale)
    scale_of_logits = q.shape[-1] ** -0.5
    return partial(
        torch.ops.fa3_fwd.fwd, q, k, v, **options, softmax_scale=scale_of_logits, is_causal=is_causal,
        num_splits=splits,
    )  # fmt: skip


def quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mode: str,
    angles: dict[str, torch.Tensor] | None = None,
    constant: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """What `quantized_attention` hands to `attention_8bit`."""
    blocks: dict[str, Any] = dict(scale="block", block_size=BLOCK_SIZE)
    front: dict[str, Any] = angles or {}
    query, query_scale = rotate_quantize(q, dtype=DTYPES[mode], **front)
    key, key_scale = rotate_quantize(k, dtype=DTYPES[mode], offset=constant, **blocks, **front)
    value, value_scale = rotate_quantize(
        v, rotate=False, transpose=True, interleave=True, power_of_2=True, **blocks
    )
    return query, key, value, query_scale, key_scale, value_scale


def angles_of(tokens: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 cos and sin ``[1, S, D]`` of rotary embeddings."""
    angles = torch.arange(tokens, device="cuda")[:, None] * 10000.0 ** -torch.linspace(0, 1, d // 2).cuda()
    angles = torch.cat((angles, angles), -1)[None]
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def sdpa_after_rope(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_causal: bool
) -> torch.Tensor:
    q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION, is_causal)


def rotated_in_front(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_causal: bool,
    mode: str,
) -> torch.Tensor:
    """8-bit attention with RoPE in the pass that quantizes, and a K constant that was calibrated before."""
    angles = dict(cos=cos[..., : q.shape[-1] // 2], sin=sin[..., : q.shape[-1] // 2])
    constant = torch.zeros(KEY_HEADS, q.shape[-1], device="cuda")
    return attention_8bit(
        *quantize(q, k, v, mode, angles, constant), scale=q.shape[-1] ** -0.5, is_causal=is_causal
    )


def prefill(d: int, tokens: int, is_causal: bool) -> dict[str, Any]:
    """Microseconds and TFLOP/s of everybody."""
    q, k, v = random_inputs(TOKENS // tokens, tokens, tokens, d)
    calls: dict[str, Call] = {
        "sdpa flash": partial(sdpa, q, k, v, SDPBackend.FLASH_ATTENTION, is_causal),
        "sdpa cudnn": partial(sdpa, q, k, v, SDPBackend.CUDNN_ATTENTION, is_causal),
    }
    if has_fa3():
        calls["fa3 bf16"] = fa3(q, k, v, is_causal)
        calls["fa3 fp8 kernel"] = fa3(q, k, v, is_causal, is_8bit=True)
    for mode in DTYPES:
        options: dict[str, Any] = dict(scale=d**-0.5, is_causal=is_causal)
        calls[f"{mode} kernel"] = partial(attention_8bit, *quantize(q, k, v, mode), **options)
        calls[f"{mode} all"] = partial(quantized_attention, q, k, v, is_causal=is_causal, mode=mode)
    angles = angles_of(tokens, d)
    calls["sdpa cudnn, rope"] = partial(sdpa_after_rope, q, k, v, *angles, is_causal)
    for mode in DTYPES:
        calls[f"{mode} all, rope"] = partial(rotated_in_front, q, k, v, *angles, is_causal, mode)
    operations = 4 * TOKENS * HEADS * tokens * d * (0.5 if is_causal else 1)
    row: dict[str, Any] = dict(d=d, tokens=tokens, causal=is_causal, us={}, tflops={}, error={}, failed={})
    expected = calls["sdpa flash"]().float()
    for name, call in calls.items():
        try:
            out = call()
            out = out[0] if isinstance(out, tuple | list) else out
            out = out if out.shape == expected.shape else out.transpose(1, 2)
            # Against bf16 attention, which is off itself: whether they compute the same.
            if "rope" not in name:
                row["error"][name] = round(float((out.float() - expected).norm() / expected.norm()), 4)
            us = graph_time([call], _REPEATS)
        except Exception as error:
            row["failed"][name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        row["us"][name] = round(us, 1)
        row["tflops"][name] = round(operations / us / 1e6)
    return row


class Cache:
    """An 8-bit cache of one layer, full but for one token, and the next token of a model."""

    def __init__(self, batch: int, keys: int, d: int, dtype: torch.dtype):
        self.q, self.k, self.v = random_inputs(batch, 1, 1, d)
        # Bytes below 120 are finite in e4m3.
        self.keys = torch.randint(0, 120, (batch, KEY_HEADS, keys, d), dtype=torch.uint8, device="cuda")
        self.values = torch.randint(0, 120, (batch, KEY_HEADS, d, keys), dtype=torch.uint8, device="cuda")
        self.keys, self.values = self.keys.view(dtype), self.values.view(E4M3)
        self.key_scale, self.value_scale = (
            torch.full((batch, KEY_HEADS, keys), 2.0**-7, device="cuda") for _ in range(2)
        )
        self.query_start = torch.full((batch,), keys - 1, dtype=torch.int32, device="cuda")
        self.constant = torch.randn(batch, KEY_HEADS, d, device="cuda")

    def attend(self, query: torch.Tensor, query_scale: torch.Tensor) -> torch.Tensor:
        tensors = (query, self.keys, self.values, query_scale, self.key_scale, self.value_scale)
        return attention_8bit(*tensors, scale=query.shape[-1] ** -0.5, query_start=self.query_start)

    def step(self) -> torch.Tensor:
        """What a layer does for a token."""
        return self.attend(*self.quantize())

    def quantize(self) -> tuple[torch.Tensor, torch.Tensor]:
        buffers = (self.keys, self.values, self.key_scale, self.value_scale)
        return quantize_step_into_cache(
            self.q, self.k, self.v, *buffers, self.query_start, constant=self.constant
        )


def decode(batch: int, keys: int, bandwidth: float) -> dict[str, Any]:
    """Microseconds, and the share of the copy's bandwidth at which K and V are read."""
    d = 128
    nbytes = 2 * batch * KEY_HEADS * keys * d
    copies = max(2, math.ceil(ROTATED_BYTES / nbytes))
    row: dict[str, Any] = dict(batch=batch, keys=keys, d=d, us={}, share_of_copy={}, failed={})

    def time(name: str, calls: Sequence[Call], read: int | None = None) -> None:
        try:
            us = graph_time(calls, _REPEATS)
        except Exception as error:
            row["failed"][name] = f"{type(error).__name__}: {str(error)[:200]}"
            return
        row["us"][name] = round(us, 2)
        if read is not None:
            row["share_of_copy"][name] = round(read / bandwidth * 1e6 / us, 3)

    for mode, dtype in DTYPES.items():
        caches = [Cache(batch, keys, d, dtype) for _ in range(copies)]
        queries = [cache.quantize() for cache in caches]
        time(f"{mode} all", [cache.step for cache in caches], nbytes)
        attend = [partial(cache.attend, *query) for cache, query in zip(caches, queries, strict=True)]
        time(f"{mode} kernel", attend, nbytes)
        time(f"{mode} quantize", [cache.quantize for cache in caches])
        del caches, attend
    inputs = [random_inputs(batch, 1, keys, d) for _ in range(copies)]
    if has_fa3():
        calls = [fa3(q, k, v, False, is_8bit=True, splits=0) for q, k, v in inputs]
        time("fa3 fp8 kernel", calls, nbytes)
        del calls
    time(
        "sdpa flash bf16",
        [partial(sdpa, q, k, v, SDPBackend.FLASH_ATTENTION, False) for q, k, v in inputs],
        2 * nbytes,
    )
    return row


def compile_ahead(job: tuple[str, int, int, bool, int]) -> None:
    """One call of what will be timed, for the compilers' caches on disk."""
    mode, d, tokens, is_causal, batch = job
    with torch.no_grad():
        if tokens > 1:
            q, k, v = random_inputs(batch, tokens, tokens, d)
            quantized_attention(q, k, v, is_causal=is_causal, mode=mode)
            rotated_in_front(q, k, v, *angles_of(tokens, d), is_causal, mode)
        else:
            Cache(batch, 4096, d, DTYPES[mode]).step()
        torch.cuda.synchronize()


def print_prefill(row: dict[str, Any]) -> None:
    cells = [f"{name} {tflops}" for name, tflops in row["tflops"].items()]
    kind = "causal" if row["causal"] else "full"
    print(f"D {row['d']} {kind} {row['tokens']}: " + " | ".join(cells), row["failed"] or "")


def print_decode(row: dict[str, Any]) -> None:
    shares = {name: f" {100 * share:.0f}%" for name, share in row["share_of_copy"].items()}
    cells = [f"{name} {us} us{shares.get(name, '')}" for name, us in row["us"].items()]
    print(f"batch {row['batch']} x {row['keys']}: " + " | ".join(cells), row["failed"] or "")


def main(
    dims: Annotated[str, typer.Option(help="Head sizes of prefill, separated by commas.")] = "128,64",
    parts: Annotated[str, typer.Option(help="prefill, decode.")] = "prefill,decode",
    kernel: Annotated[str | None, typer.Option(help="Only attention_triton, say.")] = None,
    json_file: JsonFile = None,
) -> None:
    require_gpu()
    if kernel is not None:
        attention._KERNELS = tuple(kernel.split(","))
    head_dims = [int(d) for d in dims.split(",")]
    command = f"python scripts/benchmark_attention.py --dims {dims} --parts {parts}"
    report = about_this_run(command + (f" --kernel {kernel}" if kernel else ""))
    kinds = [(d, 1024, is_causal, 1) for d in head_dims for is_causal in (True, False)]
    kinds += [(128, 1, True, batch) for batch in (1, 8)]
    jobs = [(mode, *kind) for mode in DTYPES for kind in kinds]
    for job, error in zip(jobs, in_processes(compile_ahead, jobs), strict=True):
        if error is not None:
            print(f"{job}: {error}")
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    report["copy_bandwidth_tb_per_s"] = round(bandwidth / 1e12, 3)
    report["prefill"], report["decode"] = [], []
    with torch.no_grad():
        # The first graph of a run is slow.
        if "prefill" in parts:
            prefill(head_dims[0], 1024, True)
        for d in head_dims if "prefill" in parts else ():
            for is_causal in (True, False):
                for tokens in PREFILLS:
                    report["prefill"].append(prefill(d, tokens, is_causal))
                    print_prefill(report["prefill"][-1])
        for batch, keys in DECODES if "decode" in parts else ():
            report["decode"].append(decode(batch, keys, bandwidth))
            torch.cuda.empty_cache()
            print_decode(report["decode"][-1])
    write_report(report, json_file)


if __name__ == "__main__":
    typer.run(main)
