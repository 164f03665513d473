"""rotate_quantize on the CPU: what it computes, what it refuses, and that torch can trace it."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from rotate_quantize_exact import SUMS, exact_rotation, in_token_order, worst_error

from hf_hadacore.errors import FormatError, UnsupportedError
from hf_hadacore.hadamard_matrices import hadamard_matrix
from hf_hadacore.kernels.rotate_quantize import SMALLEST_MAXIMUM, rotate_quantize, rotate_quantize_into_cache
from hf_hadacore.kernels.rotate_quantize_checks import LARGEST

X_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
GROUPS = {"token": 1, "block": 16, "head": 0}
ops = torch.ops.hf_hadacore


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rope_of(
    batch: int, tokens: int, width: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    angles = 7 * random(batch, tokens, width, seed=99)
    return dict(cos=angles.cos().to(dtype), sin=angles.sin().to(dtype))


@pytest.mark.parametrize("x_dtype", X_DTYPES)
@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("scale", GROUPS)
def test_against_float64(scale, dtype, x_dtype):
    for d in (64, 80, 96, 112, 128, 192, 256):
        x = random(2, 37, 3, d, dtype=x_dtype, seed=d).transpose(1, 2)
        for rotate in (True, False):
            values, scales = rotate_quantize(x, dtype=dtype, scale=scale, block_size=16, rotate=rotate)
            assert values.is_contiguous() and values.dtype == dtype and scales.dtype == torch.float32
            exact = exact_rotation(x, rotate)
            assert worst_error(values, scales, exact, GROUPS[scale], SUMS) <= 1


@pytest.mark.parametrize("batch, width", [(1, 64), (2, 64), (1, 32)])
def test_rope_offset_and_sign_come_before_the_rotation(batch, width):
    x = random(2, 3, 21, 64, dtype=torch.bfloat16)
    sign = torch.where(random(64, seed=4) > 0, 1, -1)
    front = dict(offset=random(batch, 3, 64, seed=3), sign=sign, **rope_of(batch, 21, width, torch.bfloat16))
    values, scale = rotate_quantize(x, dtype=torch.int8, **front)
    assert worst_error(values, scale, exact_rotation(x, True, **front), 1, SUMS) <= 1
    for name in front:
        if name not in ("cos", "sin"):
            assert not torch.equal(values, rotate_quantize(x, dtype=torch.int8, **front | {name: None})[0])


@pytest.mark.parametrize("has_offset", [False, True])
def test_what_bf16_rounds_disappears_behind_8_bits(has_offset):
    x, offset = random(2, 4, 90, 128, dtype=torch.bfloat16), random(4, 128, seed=5) if has_offset else None
    rope = rope_of(1, 90, 64, torch.bfloat16)
    wide_rope = {name: angle.float() for name, angle in rope.items()}
    exact = exact_rotation(x.float(), True, offset, **wide_rope)
    errors = []
    for values, scale in (
        rotate_quantize(x, offset=offset, **rope),
        rotate_quantize(x.float(), offset=offset, **wide_rope),
    ):
        errors.append(float((values.double() * scale[..., None] - exact).norm() / exact.norm()))
    assert errors[1] < errors[0] < 1.02 * errors[1], errors


def test_rotations_cancel_in_products():
    """q k^T of the rotated is that of the originals, and outliers of k cost less than without rotation."""
    q, k = random(1, 2, 50, 128), random(1, 2, 60, 128, seed=1)
    k[..., 7] += 40
    errors = []
    for rotate in (True, False):
        (q8, q_scale), (k8, k_scale) = (rotate_quantize(x, dtype=torch.int8, rotate=rotate) for x in (q, k))
        product = (q8.float() * q_scale[..., None]) @ (k8.float() * k_scale[..., None]).mT
        errors.append(float((product - q @ k.mT).norm() / (q @ k.mT).norm()))
    assert errors[0] < 0.01 and 2 * errors[0] < errors[1], errors


def test_activations_of_any_shape():
    for shape in ((64,), (5, 192), (2, 3, 320), (2, 1, 2, 3, 1024), (1, 14336), (0, 64)):
        x = random(*shape, dtype=torch.bfloat16)
        values, scale = rotate_quantize(x)
        assert values.shape == shape and scale.shape == shape[:-1]
        exact = exact_rotation(x).reshape(-1, shape[-1])
        assert worst_error(values.reshape(exact.shape), scale.reshape(-1), exact, 1, SUMS) <= 1


@pytest.mark.parametrize("dtype", LARGEST)
def test_transposed_values_are_the_same_in_aligned_rows(dtype):
    x = random(2, 3, 21, 64)
    expected, scale = rotate_quantize(x, dtype=dtype)
    values, same_scale = rotate_quantize(x, dtype=dtype, transpose=True)
    assert values.shape == (2, 3, 64, 21) and values.stride()[2:] == (32, 1)
    assert torch.equal(values.mT.float(), expected.float()) and torch.equal(scale, same_scale)


def test_interleaved_values():
    """Column by column, from the definition."""
    for tokens in (1, 15, 16, 40):
        x = random(2, 3, tokens, 64)
        expected, scale = rotate_quantize(x, dtype=torch.int8)
        values, same_scale = rotate_quantize(x, dtype=torch.int8, transpose=True, interleave=True)
        columns = -(-tokens // 16) * 16
        assert values.shape == (2, 3, 64, columns) and values.is_contiguous()
        assert torch.equal(scale, same_scale)
        for token in range(columns):
            e, t, p = token % 16 // 8, token % 8 // 2, token % 2
            column = values[..., token // 16 * 16 + 4 * t + 2 * e + p]
            assert torch.equal(column, expected[:, :, token]) if token < tokens else not column.any()


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("scale", GROUPS)
def test_scales_that_are_powers_of_two(scale, dtype):
    x = random(2, 37, 3, 128, dtype=torch.bfloat16).transpose(1, 2)
    for rotate in (True, False):
        options = dict(dtype=dtype, scale=scale, block_size=16, rotate=rotate)
        values, scales = rotate_quantize(x, power_of_2=True, **options)
        assert torch.equal(scales, rotate_quantize(x, **options)[1].log2().ceil().exp2())
        assert (
            worst_error(values, scales, exact_rotation(x, rotate), GROUPS[scale], SUMS, power_of_2=True) <= 1
        )


def test_a_power_of_two_stays():
    x = torch.tensor([448.0, -3.0])[None] * 2.0 ** torch.arange(-20, 20)[:, None]
    values, scale = rotate_quantize(x, rotate=False, power_of_2=True)
    assert torch.equal(scale, 2.0 ** torch.arange(-20, 20))
    assert torch.equal(values.float() * scale[:, None], x)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", LARGEST)
def test_cache_is_written_at_the_position(dtype, transpose):
    x = random(2, 3, 5, 64)
    front = dict(offset=random(3, 64), **rope_of(1, 5, 64))
    expected, expected_scale = rotate_quantize(x, dtype=dtype, transpose=transpose, **front)
    values = torch.full((2, 3, 64, 12) if transpose else (2, 3, 12, 64), 99.0).to(dtype)
    before = values.clone()
    scale = torch.full((2, 3, 12), float("nan"))
    rotate_quantize_into_cache(x, values, scale, torch.tensor([4]), transpose=transpose, **front)
    shown, before, expected = ((t.mT if transpose else t).float() for t in (values, before, expected))
    assert torch.equal(shown[:, :, 4:9], expected) and torch.equal(scale[:, :, 4:9], expected_scale)
    for others in (slice(0, 4), slice(9, 12)):
        assert torch.equal(shown[:, :, others], before[:, :, others]) and scale[:, :, others].isnan().all()
    with pytest.raises(IndexError):
        rotate_quantize_into_cache(x, values, scale, torch.tensor([8]), transpose=transpose, **front)


def test_interleaved_cache():
    x, tokens = random(2, 3, 11, 64), 40
    expected, expected_scale = rotate_quantize(x, dtype=torch.int8, power_of_2=True, rotate=False)
    for start in (0, 4, 16, 29):
        values, scale = torch.full((2, 3, 64, 48), 99, dtype=torch.int8), torch.full((2, 3, tokens), 0.5)
        options = dict(transpose=True, interleave=True, power_of_2=True, rotate=False)
        rotate_quantize_into_cache(x, values, scale, torch.tensor([start]), **options)
        shown, written = in_token_order(values).mT, torch.arange(start, start + 11)
        assert torch.equal(shown[:, :, written], expected)
        assert torch.equal(scale[:, :, written], expected_scale)
        assert int((shown == 99).all(-1).sum()) == 6 * (48 - 11) and int((scale == 0.5).sum()) == 6 * 29


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("scale", GROUPS)
def test_zeros_and_what_is_not_finite(scale, dtype):
    options = dict(dtype=dtype, scale=scale, block_size=16)
    smallest = rotate_quantize(torch.zeros(1, 2, 20, 64), power_of_2=True, **options)[1]
    assert (smallest.frexp().mantissa == 0.5).all() and (smallest < 2.0**-105).all()
    values, scales = rotate_quantize(torch.zeros(1, 2, 20, 64), **options)
    assert not values.float().any()
    assert torch.equal(scales, torch.full_like(scales, SMALLEST_MAXIMUM * 64**-0.5 / LARGEST[dtype]))
    tiny = torch.full((1, 2, 20, 64), 1e-40)
    assert rotate_quantize(tiny, **options)[0].float().isfinite().all()
    for bad, power_of_2 in product((float("nan"), float("inf")), (False, True)):
        x = random(1, 2, 20, 64)
        x[0, 1, 3, 5] = bad
        values, scales = rotate_quantize(x, power_of_2=power_of_2, **options)
        per_token = scales.reshape(1, 2, -1).repeat_interleave(GROUPS[scale] or 20, -1)[..., :20]
        wrong = ~(values.float() * per_token[..., None]).isfinite()
        expected = torch.zeros_like(wrong)
        expected[0, 1, {"token": slice(3, 4), "block": slice(0, 16), "head": slice(0, 20)}[scale]] = True
        assert torch.equal(wrong, expected)


def test_int8_rounds_ties_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, -0.5, -1.5, 2.5, -126.5, -127.0]])
    values, scale = rotate_quantize(x, dtype=torch.int8, rotate=False)
    assert values.tolist() == [[127, 0, 2, 0, -2, 2, -126, -127]] and scale.item() == 1


def test_no_tokens():
    x = torch.empty(2, 3, 0, 64)
    for scale, shape in (("token", (2, 3, 0)), ("block", (2, 3, 0)), ("head", (2, 3))):
        values, scales = rotate_quantize(x, scale=scale, offset=torch.zeros(3, 64))
        assert values.shape == x.shape and scales.shape == shape
        assert scales.isfinite().all() and (scales > 0).all()
    for interleave in (False, True):
        assert rotate_quantize(x, transpose=True, interleave=interleave)[0].shape == (2, 3, 64, 0)
    values, scale = torch.ones(2, 3, 4, 64).to(torch.int8), torch.ones(2, 3, 4)
    rotate_quantize_into_cache(x, values, scale, torch.tensor(2))
    assert values.all() and scale.all()


def test_opcheck():
    x, sign = random(2, 5, 3, 64, dtype=torch.bfloat16).transpose(1, 2), torch.ones(64)
    cos, sin = rope_of(1, 5, 64).values()
    full = (random(3, 64), cos, sin, sign)
    for dtype, scale, form, front in [
        (torch.float8_e4m3fn, "token", (True, False, False, False), (None,) * 4),
        (torch.float8_e5m2, "block", (True, True, False, False), full),
        (torch.float8_e4m3fn, "block", (False, True, True, True), (None,) * 4),
        (torch.int8, "head", (True, False, False, True), full),
    ]:
        torch.library.opcheck(ops.rotate_quantize.default, (x, dtype, scale, 16, *form, *front))
    scales = torch.zeros(2, 3, 9)
    for shape, form in (
        ((2, 3, 9, 64), (True, False, False, False)),
        ((2, 3, 64, 16), (True, True, True, True)),
    ):
        arguments = (x, torch.zeros(shape, dtype=torch.int8), scales, torch.tensor(2), *form, *full)
        torch.library.opcheck(ops.rotate_quantize_into_cache.default, arguments)


def test_compiles_in_one_graph():
    compiled = torch.compile(
        lambda x: rotate_quantize(F.silu(x), scale="block"), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for tokens in (70, 64):
        x = random(1, 2, tokens, 64)
        for ours, eager in zip(compiled(x), rotate_quantize(F.silu(x), scale="block"), strict=True):
            assert torch.equal(ours.float(), eager.float())


def test_refuses_what_does_not_fit():
    x, cos, offset = torch.ones(2, 3, 5, 64), torch.ones(1, 5, 64), torch.ones(3, 64)
    values, scale = torch.zeros(2, 3, 9, 64, dtype=torch.int8), torch.zeros(2, 3, 9)

    tall, position = values.mT.contiguous(), torch.tensor(0)

    def write(x=x, values=values, scale=scale, position=position, **options):
        rotate_quantize_into_cache(x, values, scale, position, **options)

    for call, message in [
        (lambda: rotate_quantize(x.double()), "x: expected fp16.*float64"),
        (lambda: rotate_quantize(x[..., :63]), r"even last dimension.*\(2, 3, 5, 63\)"),
        (lambda: rotate_quantize(x[..., :0]), "even last dimension"),
        (lambda: rotate_quantize(x, dtype=torch.uint8), "dtype.*int8.*uint8"),
        (lambda: rotate_quantize(x, scale="tensor"), "scale.*'token'.*'tensor'"),
        (lambda: rotate_quantize(x, scale="block", block_size=48), "block_size.*64.*48"),
        (lambda: rotate_quantize(x[0], scale="head"), r"\[B, H, S, D\].*\(3, 5, 64\)"),
        (lambda: rotate_quantize(x[0], transpose=True), r"\[B, H, S, D\].*\(3, 5, 64\)"),
        (lambda: rotate_quantize(x, interleave=True), "interleave.*transpose=True"),
        (lambda: rotate_quantize(x, cos=cos), "cos, sin: expected both"),
        (lambda: rotate_quantize(x, cos=cos, sin=cos[:, :4]), "cos, sin"),
        (lambda: rotate_quantize(x, cos=cos.half(), sin=cos), "cos, sin"),
        (lambda: rotate_quantize(x, cos=cos[..., :16], sin=cos[..., :16]), "64 or 32"),
        (lambda: rotate_quantize(x, offset=offset.half()), "offset: expected fp32.*float16"),
        (lambda: rotate_quantize(x, offset=offset[:2]), r"offset.*\(2, 64\)"),
        (lambda: rotate_quantize(x, offset=offset.expand(3, 3, 64)), r"offset.*\(3, 3, 64\)"),
        (lambda: rotate_quantize(x, sign=torch.ones(32)), r"sign.*\[64\].*\(32,\)"),
        (lambda: rotate_quantize(x, sign=torch.ones(64), rotate=False), "sign.*rotate=True"),
        (lambda: rotate_quantize(x, sign=torch.ones(64, device="meta")), "sign.*cpu.*meta"),
        (lambda: write(x=x[0]), "expected"),
        (lambda: write(values=values[:1]), "values"),
        (lambda: write(values=values.float()), "dtype.*float32"),
        (lambda: write(values=values.mT.contiguous().mT), "contiguous values"),
        (lambda: write(transpose=True), r"values \[2, 3, 64, capacity\]"),
        (lambda: write(values=tall, transpose=True, interleave=True), "rounded up to a multiple of 16"),
        (lambda: write(interleave=True), "interleave.*transpose=True"),
        (lambda: write(scale=scale.half()), "scale"),
        (lambda: write(position=position.int()), "position torch.int32"),
    ]:
        with pytest.raises(FormatError, match=message):
            call()
    with pytest.raises(UnsupportedError, match="order 6"):
        rotate_quantize(torch.ones(1, 6))
    assert rotate_quantize(torch.ones(1, 6), rotate=False)[0].shape == (1, 6)


def test_matrix_is_what_multiplies_a_row():
    """y = H x, not H^T x: orders like 12 are not symmetric."""
    h = hadamard_matrix(12).float()
    assert not torch.equal(h, h.T)
    values, scale = rotate_quantize(torch.eye(12), dtype=torch.int8)
    assert torch.equal(values.float().sign(), h.T)
    torch.testing.assert_close(scale, torch.full((12,), 12**-0.5 / 127))
