"""Runs the kernel of rotate_quantize under Triton's interpreter, started by test_rotate_quantize_triton.py.

The interpreter's bf16 products and casts to 8-bit floats are wrong without a word: everything here is fp16 or
fp32, and for 8-bit floats the kernel gives what it would cast.
"""

import os
from itertools import product

os.environ["TRITON_INTERPRET"] = "1"

import torch
from rotate_quantize_exact import SUMS, exact_rotation, in_token_order, worst_error

from hf_hadacore.kernels import rotate_quantize_triton
from hf_hadacore.kernels.rotate_quantize import SMALLEST_MAXIMUM, rotate_quantize
from hf_hadacore.kernels.rotate_quantize_checks import LARGEST

NAN = float("nan")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def run(
    x: torch.Tensor,
    dtype: torch.dtype = torch.int8,
    group: int = 1,
    rotate: bool = True,
    transpose: bool = False,
    interleave: bool = False,
    power_of_2: bool = False,
    **front: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel makes of x, as ``[B, H, S, D]``; memory behind the last token must stay as it was."""
    batch, heads, tokens, d = x.shape
    capacity = -(-tokens // 16) * 16 + 16
    is_integer = dtype == torch.int8
    values = torch.full((batch, heads, capacity, d), 99 if is_integer else NAN)
    values = values.to(torch.int8) if is_integer else values
    if transpose:
        values = values.mT.contiguous()
    sizes = {0: (batch, heads), 1: (batch, heads, capacity)}
    scale = torch.full(sizes.get(group, (batch, heads, -(-tokens // max(group, 1)))), NAN)
    rotate_quantize_triton.launch(
        x,
        values,
        scale,
        group=group,
        largest=LARGEST[dtype],
        smallest=SMALLEST_MAXIMUM,
        rotate=rotate,
        transpose=transpose,
        interleave=interleave,
        power_of_2=power_of_2,
        **front,
    )
    values = in_token_order(values) if interleave else values
    values = values.mT if transpose else values
    behind = values[:, :, tokens:]
    if transpose:
        assert not behind[:, :, : -tokens % 16].any()
        behind = behind[:, :, -tokens % 16 :]
    assert (behind == 99).all() if is_integer else behind.isnan().all()
    if group == 1:
        assert scale[:, :, tokens:].isnan().all()
        scale = scale[:, :, :tokens]
    return values[:, :, :tokens].to(dtype), scale


def check(x: torch.Tensor, dtype: torch.dtype = torch.int8, group: int = 1, **options) -> None:
    values, scale = run(x, dtype, group, **options)
    options.pop("transpose", None)
    options.pop("interleave", None)
    power_of_2 = options.pop("power_of_2", False)
    norm = x.shape[-1] ** -0.5 if options.get("rotate", True) else 1.0
    exact = exact_rotation(x, **options)
    assert worst_error(values, scale, exact, group, SUMS, norm, power_of_2) <= 1, (
        x.shape,
        dtype,
        group,
        options.keys(),
    )


def check_sizes() -> None:
    for number, d in enumerate((2, 6 * 2, 16, 64, 80, 96, 112, 128, 192, 256)):
        x = random(1, 2, 67, d, seed=d)
        check(x, list(LARGEST)[number % 3])
        check(x, group=(0, 16, 64, 128)[number % 4])
        sign = torch.where(random(d) > 0, 1, -1).to(torch.int8)
        check(x, torch.float8_e4m3fn, transpose=bool(number % 2), sign=sign)


def check_layouts() -> None:
    check(random(2, 33, 3, 64).transpose(1, 2))
    check(random(2, 33, 9, 64)[:, :, 3:6].transpose(1, 2), torch.float8_e4m3fn, transpose=True)
    check(random(1, 2, 65, 128)[..., ::2])
    check(random(1, 2, 65, 67)[..., 1:65])
    check(random(1, 1, 300, 64), group=128)
    check(random(3, 1, 1, 128))
    check(random(3, 1, 1, 128), group=0)
    check(random(1, 2, 70, 48), rotate=False, transpose=True)
    check(random(1, 2, 70, 70), rotate=False, group=16)
    check(random(1, 2, 70, 128).float(), torch.float8_e5m2)


def check_front() -> None:
    for number, d in enumerate((64, 96, 128)):
        batch, heads, tokens = 2, 4, 70
        x = random(batch, tokens, heads, d, seed=1).transpose(1, 2)
        angles = 7 * random(1 if number else batch, tokens, d // 2 if number == 1 else d, seed=2).float()
        rope = dict(cos=angles.cos().half(), sin=angles.sin().half())
        offset = 10 * random(1 if number else batch, heads, d, seed=3).float()
        dtype = list(LARGEST)[number]
        check(x, dtype, **rope)
        # Some heads in a tile, each with several scales.
        check(x, dtype, group=16, **rope)
        # The last block has more places than tokens: what is subtracted from nothing must not count.
        near = (offset[:, :, None] + x).half()
        check(near, dtype, group=(64, 0, 16)[number], offset=offset)
        check(x, dtype, transpose=True, offset=offset, **rope)
        check(x, dtype, rotate=False, offset=offset, **rope)


def check_values_of_attention() -> None:
    for number, (d, tokens) in enumerate(((128, 70), (64, 1), (80, 150), (256, 16))):
        x = random(2, tokens, 3, d, seed=d).transpose(1, 2)
        form = dict(transpose=True, interleave=True, power_of_2=True)
        check(x, torch.float8_e4m3fn, group=(128, 1, 16, 0)[number], rotate=False, **form)
        check(x, group=(1, 128, 0, 64)[number], **form)
        check(x, torch.float8_e4m3fn, power_of_2=True)


def check_extremes() -> None:
    zeros = torch.zeros(1, 2, 65, 64, dtype=torch.float16)
    for group in (0, 1, 64):
        values, scale = run(zeros, group=group)
        assert not values.any() and (scale == SMALLEST_MAXIMUM * 64**-0.5 / 127).all()
        scale = run(zeros, group=group, power_of_2=True)[1]
        assert (scale == SMALLEST_MAXIMUM * 64**-0.5 / 64).all()
    check(torch.full((1, 1, 3, 128), 65504.0, dtype=torch.float16))
    check(torch.full((1, 1, 3, 128), 6e-8, dtype=torch.float16), torch.float8_e4m3fn)
    outliers = random(1, 2, 65, 128)
    outliers[..., 5] *= 1000
    check(outliers, group=64)
    for bad in (NAN, float("inf")):
        x = random(1, 2, 65, 64)
        x[0, 1, 3, 7] = bad
        for group, power_of_2 in product((0, 1, 64), (False, True)):
            values, scale = run(x, group=group, power_of_2=power_of_2)
            per_token = scale.reshape(1, 2, -1).repeat_interleave(group or 65, -1)[..., :65]
            wrong = ~(values * per_token[..., None]).isfinite()
            expected = torch.zeros_like(wrong)
            expected[0, 1, slice(3, 4) if group == 1 else slice(0, group or 65)] = True
            assert torch.equal(wrong, expected), (bad, group)


def check_cache() -> None:
    x = random(2, 2, 7, 64)
    for power_of_2, (start, written) in product((False, True), ((0, 7), (4, 7), (18, 2))):
        expected, expected_scale = rotate_quantize(x, dtype=torch.int8, power_of_2=power_of_2)
        for transpose, interleave in ((False, False), (True, False), (True, True)):
            shape = (2, 2, 64, 32 if interleave else 20) if transpose else (2, 2, 20, 64)
            values = torch.full(shape, 99, dtype=torch.int8)
            scale = torch.full((2, 2, 20), NAN)
            rotate_quantize_triton.launch(
                x,
                values,
                scale,
                group=1,
                largest=127.0,
                smallest=SMALLEST_MAXIMUM,
                rotate=True,
                transpose=transpose,
                interleave=interleave,
                power_of_2=power_of_2,
                position=torch.tensor([start]),
            )
            values = in_token_order(values) if interleave else values
            values = values.mT if transpose else values
            new = slice(start, start + written)
            assert torch.equal(values[:, :, new], expected[:, :, :written])
            assert torch.equal(scale[:, :, new], expected_scale[:, :, :written])
            values[:, :, new], scale[:, :, new] = 99, NAN
            assert (values == 99).all() and scale.isnan().all()


if __name__ == "__main__":
    for part in (
        check_sizes,
        check_layouts,
        check_front,
        check_values_of_attention,
        check_extremes,
        check_cache,
    ):
        part()
    print("interpreted rotate_quantize")
