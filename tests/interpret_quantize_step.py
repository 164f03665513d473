"""Runs the kernel of quantize_step_into_cache under Triton's interpreter, beside that of rotate_quantize.

Started by test_quantize_step.py. The interpreter's bf16 products and casts to 8-bit floats are wrong without
a word: everything here is fp16, and for 8-bit floats the kernels give what they would cast. Its products add
up in an order that depends on the number of rows: all numbers here are such that sums are exact.
"""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from hf_hadacore.kernels import quantize_step_triton, rotate_quantize_triton
from hf_hadacore.kernels.rotate_quantize import SMALLEST_MAXIMUM
from hf_hadacore.kernels.rotate_quantize_checks import LARGEST, whole_rows

HEADS, KEY_HEADS, ROOM = 3, 2, 40
NAN = float("nan")


def random(*shape: int, seed: int) -> torch.Tensor:
    """fp16 multiples of 1/4."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return ((4 * x).round() / 4).half()


def cache(batch: int, d: int, key_dtype: torch.dtype) -> list[torch.Tensor]:
    """Keys, values and their scales, filled with what nobody writes."""
    keys = torch.full((batch, KEY_HEADS, ROOM, d), 99).to(key_dtype)
    values = torch.full((batch, KEY_HEADS, d, whole_rows(ROOM)), NAN)
    return [keys, values, *torch.full((2, batch, KEY_HEADS, ROOM), NAN)]


def expected(q, k, v, buffers, positions, largest_key, query, query_scale, constant, cos, sin) -> None:
    """The three launches, for each sequence those that write."""

    def launch(x, values, scale, largest, **options: Any) -> None:
        form = dict(group=1, smallest=SMALLEST_MAXIMUM, rotate=True, transpose=False) | options
        rotate_quantize_triton.launch(x, values, scale, largest=largest, **form)

    launch(q, query, query_scale, largest_key, cos=cos, sin=sin)
    for b, position in enumerate(positions.long().expand(len(q)).view(-1, 1)):
        keys, values, key_scale, value_scale = (buffer[b : b + 1] for buffer in buffers)
        offset, *angles = (t if t is None or len(t) == 1 else t[b : b + 1] for t in (constant, cos, sin))
        front = dict(offset=offset, cos=angles[0], sin=angles[1])
        launch(k[b : b + 1], keys, key_scale, largest_key, position=position, **front)
        form = dict(rotate=False, transpose=True, interleave=True, power_of_2=True)
        largest = LARGEST[torch.float8_e4m3fn]
        launch(v[b : b + 1], values, value_scale, largest, position=position, **form)


def check(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    dtype: torch.dtype,
    **front,
) -> None:
    """That the bits are the same everywhere; keys that are no integers are fp32."""
    q, largest = inputs[0], LARGEST[dtype]
    key_dtype = dtype if dtype == torch.int8 else torch.float32
    results = []
    for is_step in (True, False):
        buffers = cache(len(q), q.shape[3], key_dtype)
        query, query_scale = torch.full(q.shape, 99).to(key_dtype), torch.full(q.shape[:3], NAN)
        if is_step:
            quantize_step_triton.launch(
                *inputs,
                *buffers,
                positions,
                query,
                query_scale,
                largest_key=largest,
                largest_value=LARGEST[torch.float8_e4m3fn],
                smallest=SMALLEST_MAXIMUM,
                **front,
            )
        else:
            expected(*inputs, buffers, positions, largest, query, query_scale, **front)
        results.append([query, query_scale, *buffers])
    assert results[0][1].isfinite().all()
    written = results[0][4].isfinite().sum(-1)
    tokens = (ROOM - positions.expand(len(q))).clamp(max=q.shape[2])
    assert torch.equal(written, tokens[:, None].expand_as(written)), (written, tokens)
    for number, (step, three) in enumerate(zip(*results, strict=True)):
        assert torch.equal(step.float().nan_to_num(nan=777.0), three.float().nan_to_num(nan=777.0)), number


def main() -> None:
    layouts = ("contiguous", "tokens first", "every second")
    angles = ("none", "half", "whole")
    sizes = ((128, 1), (64, 3), (96, 16), (256, 1), (12, 5), (128, 16), (64, 1), (80, 2))
    for number, (d, tokens) in enumerate(sizes):
        batch, layout, rope = 1 + number % 3, layouts[number % 3], angles[number // 2 % 3]
        inputs = []
        for seed, heads in enumerate((HEADS, KEY_HEADS, KEY_HEADS)):
            x = random(batch, heads, tokens, d, seed=3 * number + seed)
            if layout == "tokens first":
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
            elif layout == "every second":
                x = torch.stack((x, x), -1).flatten(-2)[..., ::2]
            inputs.append(x)
        front: dict[str, Any] = dict(constant=None, cos=None, sin=None)
        if number % 4 != 3:
            front["constant"] = 10 * random(batch if number % 2 else 1, KEY_HEADS, d, seed=5).float()
        if rope != "none":
            width = d if rope == "whole" else d // 2
            cos, sin = (random(batch if number % 2 else 1, tokens, width, seed=seed) for seed in (6, 7))
            front |= dict(cos=cos, sin=sin)
        for position in (torch.tensor([number % 20]), torch.tensor([ROOM - 1])):
            check(tuple(inputs), position, torch.int8, **front)
        each = torch.arange(batch, dtype=torch.int32) * 13 + 1
        check(tuple(inputs), each, torch.float8_e4m3fn, **front)
        inputs[1][0, 1] = 0
        inputs[2][0, 0] = 0
        check(tuple(inputs), each, torch.int8, **front)
    print("interpreted quantize_step")


if __name__ == "__main__":
    main()
