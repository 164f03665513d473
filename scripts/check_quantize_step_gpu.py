"""Is `quantize_step_into_cache` right on this GPU?

    python scripts/check_quantize_step_gpu.py --json scripts/results/check_quantize_step.json

Values are held to float64, one by one, as in check_rotate_quantize_gpu.py; what nobody writes must stay. Then
a step with attention, whose kernels overlap, is captured in a CUDA graph and replayed with new inputs: it
must give the bits that it gives kernel by kernel.
"""

import random
from itertools import product
from typing import Any

import torch
import typer
from gpu_processes import in_processes
from gpu_report import JsonFile, SanitizeOnly, about_this_run, conclude, require_gpu
from rotate_quantize_exact import SUMS, TWO_TERMS, exact_rotation, in_token_order, worst_error

from hf_hadacore.kernels.attention import attention_8bit
from hf_hadacore.kernels.quantize_step import quantize_step_into_cache

E4M3 = torch.float8_e4m3fn
HEADS, KEY_HEADS, ROOM = 8, 2, 4096
REPLAYS = 200
VARIANTS = list(
    product((64, 80, 128, 256), (torch.bfloat16, torch.float16, torch.float32), (E4M3, torch.int8), (0, 1, 2))
)


def draw(generator: random.Random, batch: int, tokens: int, d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k and v in one of the layouts of models."""
    shapes = [(batch, tokens, heads, d) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    if generator.random() < 0.5:
        wide = torch.randn(batch, tokens, HEADS + 2 * KEY_HEADS, d, device="cuda").to(dtype)
        return [x.transpose(1, 2) for x in wide.split([HEADS, KEY_HEADS, KEY_HEADS], dim=2)]
    return [torch.randn(shape, device="cuda").to(dtype).transpose(1, 2).contiguous() for shape in shapes]


def buffers_of(batch: int, d: int, key_dtype: torch.dtype) -> list[torch.Tensor]:
    """Keys, values and their scales; a byte of 3 is finite in every dtype."""
    keys = torch.full((batch, KEY_HEADS, ROOM, d), 3, dtype=torch.int8, device="cuda").view(key_dtype)
    values = torch.full((batch, KEY_HEADS, d, ROOM), 3, dtype=torch.int8, device="cuda").view(E4M3)
    return [keys, values, *torch.full((2, batch, KEY_HEADS, ROOM), 2.0**-9, device="cuda")]


def tolerance_of(dtype: torch.dtype, has_front: bool) -> float:
    is_split = dtype == torch.float32 or (dtype == torch.float16 and has_front)
    return TWO_TERMS if is_split else SUMS


@torch.no_grad()
def check(variant: tuple[int, torch.dtype, torch.dtype, int]) -> float:
    """The worst error of some cases of a variant, where 1 is what rounding may cost."""
    d, dtype, key_dtype, rope = variant
    generator = random.Random(str(variant))
    torch.manual_seed(generator.randrange(1 << 30))
    worst = 0.0
    for tokens in (1, 1, 2, 7, 16):
        batch = generator.choice([1, 3])
        q, k, v = draw(generator, batch, tokens, d, dtype)
        keys, values, key_scale, value_scale = buffers = buffers_of(batch, d, key_dtype)
        front: dict[str, Any] = {}
        if rope:
            angles = 9 * torch.randn(generator.choice([1, batch]), tokens, d // rope, device="cuda")
            front = dict(cos=angles.cos().to(dtype), sin=angles.sin().to(dtype))
        has_constant = generator.random() < 0.7
        constant = (
            torch.randn(generator.choice([1, batch]), KEY_HEADS, d, device="cuda") if has_constant else None
        )
        starts = [generator.randrange(ROOM - tokens) for _ in range(batch)]
        position = torch.tensor(starts, dtype=torch.int32, device="cuda")
        if generator.random() < 0.5:
            starts = starts[:1] * batch
            position = torch.tensor(starts[:1], device="cuda")
        query, query_scale = quantize_step_into_cache(
            *(q, k, v, *buffers, position), constant=constant, **front
        )
        norm, tolerance = d**-0.5, tolerance_of(dtype, rope > 0)
        exact = exact_rotation(q, **front)
        worst = max(worst, worst_error(query, query_scale, exact, 1, tolerance, norm))
        tolerance = tolerance_of(dtype, rope > 0 or has_constant)
        in_order = in_token_order(values.view(torch.int8)).mT.view(E4M3)
        exact_key, exact_value = exact_rotation(k, offset=constant, **front), exact_rotation(v, False)
        for b, start in enumerate(starts):
            new = slice(start, start + tokens)
            of_key = (keys[b, :, new], key_scale[b, :, new], exact_key[b], 1, tolerance, norm)
            of_value = (in_order[b, :, new], value_scale[b, :, new], exact_value[b], 1, SUMS)
            worst = max(worst, worst_error(*of_key), worst_error(*of_value, power_of_2=True))
            for bytes_of in (keys.view(torch.int8), in_order.view(torch.int8)):
                bytes_of[b, :, new] = 3
            for scale in (key_scale, value_scale):
                scale[b, :, new] = 2.0**-9
        for bytes_of in (keys.view(torch.int8), in_order.view(torch.int8)):
            assert bool((bytes_of == 3).all()), "something else was written"
        assert bool((torch.stack((key_scale, value_scale)) == 2.0**-9).all()), "another scale was written"
    return worst


@torch.no_grad()
def check_graph(key_dtype: torch.dtype) -> int:
    """How many replays give other bits than the kernels one by one."""
    q, k, v = inputs = draw(random.Random(0), 1, 1, 128, torch.bfloat16)
    position = torch.zeros(1, dtype=torch.int64, device="cuda")
    query_start = torch.zeros(1, dtype=torch.int32, device="cuda")
    constant = torch.randn(1, KEY_HEADS, 128, device="cuda")

    def step(buffers: list[torch.Tensor], waits: bool) -> torch.Tensor:
        keys, values, key_scale, value_scale = buffers
        query, query_scale = quantize_step_into_cache(*(q, k, v, *buffers, position), constant=constant)
        if waits:
            torch.cuda.synchronize()
        tensors = (query, keys, values, query_scale, key_scale, value_scale)
        return attention_8bit(*tensors, scale=128**-0.5, query_start=query_start)

    ours, theirs = (buffers_of(1, 128, key_dtype) for _ in range(2))
    step(ours, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Twice the same, so that a step also follows on attention.
        step(ours, False)
        out = step(ours, False)
    wrong = 0
    for number in range(REPLAYS):
        for tensor in inputs:
            tensor.normal_()
        position.fill_(number * 17 % ROOM)
        query_start.fill_(number * 17 % ROOM)
        graph.replay()
        expected = step(theirs, True)
        wrong += not (
            torch.equal(out, expected)
            and all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                for a, b in zip(ours, theirs, strict=True)
            )
        )
    return wrong


def main(
    json_file: JsonFile = None,
    sanitize_only: SanitizeOnly = False,
) -> None:
    require_gpu()
    if sanitize_only:
        assert all(check(variant) <= 1 for variant in VARIANTS[:2])
        return print("sanitize: steps of two variants ran")
    report = about_this_run("python scripts/check_quantize_step_gpu.py")
    outcomes = dict(zip(map(str, VARIANTS), in_processes(check, VARIANTS), strict=True))
    bad = [
        f"{name}: {error}"
        for name, error in outcomes.items()
        if not isinstance(error, float) or not error <= 1
    ]
    worst = max((error for error in outcomes.values() if isinstance(error, float)), default=None)
    wrong = {str(dtype): check_graph(dtype) for dtype in (E4M3, torch.int8)}
    report |= dict(variants=len(outcomes), worst_error=worst, replays=REPLAYS, wrong_replays=wrong)
    bad += [f"replays with {name} keys" for name, count in wrong.items() if count]
    conclude(report, bad, json_file)


if __name__ == "__main__":
    typer.run(main)
