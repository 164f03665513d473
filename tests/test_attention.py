"""`quantized_attention` on the CPU: its error against float64, masks as in SDPA, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from attention_exact import DISTRIBUTIONS, E4M3, Problem, exact_attention, make_inputs
from check_rotate_quantize_gpu import exact_rotation

from hf_hadacore import quantized_attention
from hf_hadacore.attention.operands import HEAD_DIMS
from hf_hadacore.errors import FormatError, UnsupportedError
from hf_hadacore.kernels.attention_reference import interleave_tokens

MODES = {"fp8": E4M3, "int8-fp8": torch.int8}
# What is to be expected of 8 bits, where inputs are N(0, 1).
EIGHT_BITS = 0.07


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(
    batch: int, heads: int, key_heads: int, tokens: int, keys: int, d: int
) -> tuple[torch.Tensor, ...]:
    return random(batch, heads, tokens, d), *(random(batch, key_heads, keys, d, seed=i) for i in (1, 2))


def exact(q, k, v, mask=None, is_causal=False, scale=None, softcap=0.0, sinks=None) -> torch.Tensor:
    """Attention in float64 as its definition has it."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = softcap * (logits / softcap).tanh() if softcap else logits
    if is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        logits = torch.cat((logits, sinks.double().view(-1, 1, 1).expand(*logits.shape[:3], 1)), -1)
    weights = logits.softmax(-1).nan_to_num(0.0)[..., : k.shape[2]]
    return weights @ v


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def quantize(x: torch.Tensor, dtype: torch.dtype, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 to 8 bits, one scale for some tokens."""
    largest = 127.0 if dtype == torch.int8 else 448.0
    maxima = torch.stack([part.abs().amax((-2, -1)) for part in x.split(size, 2)], -1)
    scale = maxima / largest
    values = x / scale.repeat_interleave(size, -1)[:, :, : x.shape[2], None]
    return (values.round() if dtype == torch.int8 else values.float()).to(dtype), scale.float()


def emulate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mode: str) -> torch.Tensor:
    """8 bits with exact rotations, products and sums."""
    mean = k.float().mean(2)
    queries, q_scale = quantize(exact_rotation(q, True), MODES[mode], 1)
    keys, k_scale = quantize(exact_rotation(k, True, mean), MODES[mode], 128)
    _, v_scale = quantize(v.double(), E4M3, 128)
    v_scale = v_scale.log2().ceil().exp2()
    values = v.double() / v_scale.repeat_interleave(128, -1)[:, :, : v.shape[2], None]
    value = interleave_tokens(values.float().to(E4M3).mT)
    problem = Problem(queries, keys, value, q_scale, k_scale, v_scale)
    return exact_attention(problem, scale=q.shape[-1] ** -0.5, is_causal=False).rounded.transpose(1, 2)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_error(name):
    """That of 8 bits and no more; int8 keys and queries have less than e4m3; rotations help outliers."""
    q, k, v = make_inputs(name, 4, 1, 512, 128)
    expected = exact(q, k, v)
    errors = {}
    for mode in MODES:
        errors[mode] = error(quantized_attention(q, k, v, mode=mode), expected)
        assert errors[mode] <= 1.01 * error(emulate(q, k, v, mode), expected), errors
    assert errors["int8-fp8"] < 0.85 * errors["fp8"]
    plain = error(quantized_attention(q, k, v, rotate=False, k_mean=False), expected)
    assert errors["fp8"] < (1.05 if name == "normal" else 0.9) * plain


@pytest.mark.parametrize("mode", MODES)
def test_constant_changes_nothing_else(mode):
    """Not even where logits are capped or compared with sinks; without it 8 bits lose what matters."""
    q, k, v = inputs(2, 4, 2, 50, 140, 64)
    k = k + 60 * random(2, 2, 1, 64, seed=7)
    options = dict(softcap=30.0, sinks=torch.tensor([3.0, -1.0, 0.0, 9.0]), scale=0.05)
    expected = exact(q, k, v, **options)
    mean = k.float().mean(2)
    for k_mean in (None, mean, mean[:1] + 0.3):
        x = slice(0, 1 if k_mean is not None and len(k_mean) == 1 else 2)
        out = quantized_attention(q[x], k[x], v[x], mode=mode, k_mean=k_mean, **options)
        assert error(out, expected[x]) < EIGHT_BITS
    assert (
        error(quantized_attention(q, k, v, mode=mode, k_mean=False, **options), expected) > 1.5 * EIGHT_BITS
    )
    # One for all sequences.
    k[1] = k[0] = k[0] + 0 * k[1]
    out = quantized_attention(q, k, v, mode=mode, k_mean=mean[0], **options)
    assert error(out, exact(q, k, v, **options)) < EIGHT_BITS


@pytest.mark.parametrize("tokens, keys", [(40, 40), (40, 90), (90, 40), (1, 30)])
def test_causal_and_windows_are_those_of_sdpa(tokens, keys):
    q, k, v = inputs(2, 4, 2, tokens, keys, 64)
    for is_causal in (False, True):
        expected = F.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), is_causal=is_causal, enable_gqa=True
        )
        assert error(quantized_attention(q, k, v, is_causal=is_causal), expected) < EIGHT_BITS
    i, n = torch.arange(tokens)[:, None], torch.arange(keys)
    seen = (n <= i) & (n > i - 7)
    out = quantized_attention(q, k, v, is_causal=True, window=7)
    assert error(out, exact(q, k, v, seen)) < EIGHT_BITS
    assert not out[:, :, ~seen.any(1)].any()
    assert error(quantized_attention(q, k, v, window=7), exact(q, k, v, n > i - 7)) < EIGHT_BITS


def test_masks_of_keys():
    """Padding on either side and between tokens, beside everything else: all of it is heeded."""
    q, k, v = inputs(4, 4, 2, 70, 70, 64)
    padding = torch.ones(4, 70, dtype=torch.bool)
    padding[0, :9] = padding[1, 50:] = padding[2, 30:35] = False
    k = torch.where(padding[:, None, :, None], k, 1000.0)
    v = torch.where(padding[:, None, :, None], v, 1000.0)
    for chosen in ([0, 1, 3], [0, 1, 2, 3], [2]):
        x = [tensor[chosen] for tensor in (q, k, v)]
        mask = padding[chosen][:, None, None]
        for is_causal in (False, True):
            expected = exact(*x, mask, is_causal)
            out = quantized_attention(*x, mask, is_causal)
            # What is hidden shares scales of 128 tokens with what is not.
            assert error(out, expected) < (EIGHT_BITS if mask.all() else 0.4)
            assert not out[expected == 0].any()
            dense = quantized_attention(*x, mask.expand(-1, 1, 70, -1), is_causal, k_mean=False)
            torch.testing.assert_close(quantized_attention(*x, mask, is_causal, k_mean=False), dense)
    nobody = quantized_attention(q, k, v, torch.zeros(70, dtype=torch.bool))
    assert not nobody.any()


def test_any_other_mask():
    q, k, v = inputs(2, 4, 2, 20, 60, 64)
    seen = random(2, 4, 20, 60, seed=5) > -0.5
    for mask in (seen, seen[:, :1], seen[0, 0], random(2, 1, 20, 60, seed=6), random(20, 60).float()):
        for is_causal in (False, True):
            out = quantized_attention(q, k, v, mask, is_causal)
            assert error(out, exact(q, k, v, mask, is_causal)) < EIGHT_BITS


@pytest.mark.parametrize(
    "d, value_dim", [(1, 1), (33, 33), (72, 72), (112, 112), (192, 128), (64, 96), (330, 330)]
)
def test_head_dims(d, value_dim):
    tensors = random(1, 4, 30, d), random(1, 2, 50, d, seed=1), random(1, 2, 50, value_dim, seed=2)
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x.to(dtype) for x in tensors)
        for rotate in (True, False):
            out = quantized_attention(q, k, v, rotate=rotate)
            assert out.shape == (1, 4, 30, value_dim) and out.dtype == dtype
            assert error(out, exact(q, k, v)) < EIGHT_BITS


def test_head_dims_are_those_of_the_kernels():
    kernel = pytest.importorskip("hf_hadacore.kernels.attention_triton")
    assert HEAD_DIMS == kernel.HEAD_DIMS


def test_nothing_to_do():
    for sizes in ((0, 4, 2, 5, 7), (2, 4, 2, 0, 7), (2, 4, 2, 5, 0)):
        q, k, v = inputs(*sizes, 64)
        out = quantized_attention(q, k, v, is_causal=True)
        assert out.shape == q.shape and not out.any()


def test_what_is_not_finite_is_seen():
    for i in range(3):
        tensors = [x.clone() for x in inputs(1, 2, 2, 40, 40, 64)]
        tensors[i][0, 1, 30, 3] = torch.inf
        out = quantized_attention(*tensors)
        assert out[:, 0].isfinite().all() and not out[:, 1, 30:31].isfinite().any()


def test_missing_gradient_is_an_error():
    for i in range(3):
        tensors = list(inputs(1, 2, 2, 9, 9, 64))
        tensors[i].requires_grad_()
        for mask in (None, torch.ones(9, 9, dtype=torch.bool).tril()):
            with pytest.raises(UnsupportedError, match="no gradient"):
                quantized_attention(*tensors, mask).sum().backward()


def test_compiles_in_one_graph():
    compiled = torch.compile(quantized_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    q, k, v = inputs(2, 4, 2, 20, 20, 64)
    padding = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    padding[1, ..., 15:] = False
    for options in (dict(is_causal=True, window=5), dict(attn_mask=padding, softcap=20.0)):
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(q, k, v, **options), quantized_attention(q, k, v, **options), rtol=2**-6, atol=2**-7
            )


def test_refuses_what_does_not_fit():
    q, k, v = inputs(2, 4, 2, 9, 12, 64)
    for change, message in [
        (dict(query=q.float()), "query: expected bf16 or fp16.*float32"),
        (dict(query=q[0]), r"query: .*\[4, 9, 64\]"),
        (dict(key=k.half()), "key: expected torch.bfloat16.*float16"),
        (dict(key=k[:1]), r"key: .*\[2, Hkv, L, D\].*\[1, 2, 12, 64\]"),
        (dict(value=v[0]), "value: expected"),
        (dict(key=k[..., :32]), r"key, value: .*L, 64\].*\[2, 2, 12, 32\]"),
        (dict(value=v[:, :, :5]), "key, value"),
        (dict(query=q[:, :3]), "multiple of key's 2, found 3"),
        (dict(enable_gqa=False), "without enable_gqa the same as key's 2, found 4"),
        (dict(mode="fp4"), "mode: expected one of.*int8-fp8.*'fp4'"),
        (dict(window=0), "window.*0"),
        (dict(softcap=0.0), "softcap.*0.0"),
        (dict(softcap=float("nan")), "softcap.*nan"),
        (dict(scale=float("inf")), "scale: expected a finite number"),
        (dict(sinks=torch.zeros(4, dtype=torch.int32)), "sinks: .*int32"),
        (dict(sinks=torch.zeros(2)), r"sinks: .*\[4\]"),
        (dict(k_mean=torch.zeros(2, 32)), r"k_mean: expected fp32 \[2, 64\].*\[2, 32\]"),
        (dict(k_mean=torch.zeros(2, 64).half()), "k_mean: .*float16"),
        (dict(k_mean=True), "k_mean: expected a tensor, False or None, found True"),
        (dict(attn_mask=torch.ones(9, 11, dtype=torch.bool)), "mask: expected boolean"),
        (dict(attn_mask=torch.ones(3, 1, 1, 12, dtype=torch.bool)), "mask: expected boolean"),
        (dict(attn_mask=torch.ones(9, 12, dtype=torch.int32)), "mask: expected boolean.*int32"),
    ]:
        with pytest.raises(FormatError, match=message):
            quantized_attention(**{"query": q, "key": k, "value": v, **change})
