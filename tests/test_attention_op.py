"""The op attention_8bit on the CPU: its specification against float64, and what it refuses."""

from itertools import product

import pytest
import torch
from attention_exact import E4M3, exact_attention, is_within_bounds, make_problem, masks
from torch.library import opcheck

from hf_hadacore.errors import FormatError, UnsupportedError
from hf_hadacore.kernels import attention_reference
from hf_hadacore.kernels.attention import attention_8bit
from hf_hadacore.kernels.attention_reference import deinterleave_tokens, interleave_tokens


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def check(problem, out_dtype=torch.float16, **options):
    y = attention_8bit(*problem, out_dtype=out_dtype, **options)
    batch, heads, tokens, d = problem.query.shape
    assert y.shape == (batch, tokens, heads, d) and y.is_contiguous() and y.dtype == out_dtype
    exact = exact_attention(problem, **options)
    assert is_within_bounds(y, exact, is_specification=True)
    sees_nothing = (exact.bound == 0).all(-1)
    assert (y[sees_nothing] == 0).all()
    return y


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("heads, key_heads", [(2, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_masks(dtype, heads, key_heads, window):
    """Padding x causal x softcap x sinks x scales, as a prefill, a chunk of one and one token."""
    sinks = torch.linspace(-1, 2, heads)
    for (tokens, keys), granularity in product(((140, 140), (23, 140), (1, 140)), ("token", "block")):
        problem = make_problem(2, heads, key_heads, tokens, keys, 32, dtype=dtype, granularity=granularity)
        for interval, is_causal, softcap, has_sinks in product(
            masks(2, tokens, keys), (True, False), (0.0, 2.0), (False, True)
        ):
            options = dict(is_causal=is_causal, window=window, softcap=softcap, **interval)
            check(problem, scale=0.2, sinks=sinks if has_sinks else None, **options)


@pytest.mark.parametrize("d", [64, 80, 96, 112, 128, 192, 256])
def test_head_dims(d):
    for dtype, out_dtype in product((torch.int8, E4M3), (torch.float16, torch.bfloat16)):
        check(make_problem(1, 4, 2, 70, 300, d, dtype=dtype), out_dtype, scale=d**-0.5)


def test_tokens_that_are_not_there_may_be_anything():
    tensors = make_problem(2, 4, 2, 5, 40, 64)
    options = dict(key_start=int32(0, 7), key_end=int32(30, 40), query_start=int32(25, 35), scale=0.125)
    expected = attention_8bit(*tensors, **options)
    for b, gone in ((0, slice(30, 40)), (1, slice(0, 7))):
        for scale in (tensors.key_scale, tensors.value_scale):
            scale[b, :, gone] = float("nan")
        values = deinterleave_tokens(tensors.value, 40).float()
        values[b, :, :, gone] = float("nan")
        tensors = tensors._replace(value=interleave_tokens(values.to(E4M3)))
    assert torch.equal(attention_8bit(*tensors, **options), expected)


def test_logit_offset_is_added_before_softcap():
    """Which is where a constant that was taken off the keys comes back."""
    problem = make_problem(2, 4, 2, 9, 60, 64)
    offset = 3 * torch.randn(2, 4, 9)
    sinks = torch.randn(4)
    for softcap in (0.0, 5.0):
        check(problem, scale=0.125, softcap=softcap, logit_offset=offset, sinks=sinks)
    # Softmax alone does not see it.
    y, moved = (attention_8bit(*problem, scale=0.125, logit_offset=x).float() for x in (None, offset.round()))
    assert (y - moved).norm() < 0.05 * y.norm()


def test_mask_of_any_shape():
    problem = make_problem(2, 4, 2, 9, 60, 64)
    allowed = torch.rand(2, 4, 9, 60) < 0.4
    allowed[0, 1, 3] = False
    for mask in (
        allowed,
        allowed[:, :1],
        allowed[0, 0],
        allowed[0, :1, :1],
        torch.randn(9, 60),
        allowed[1, 2, 3],
    ):
        check(problem, scale=0.125, mask=mask, window=30)
        check(problem, scale=0.125, mask=mask, is_causal=False, softcap=3.0, sinks=torch.randn(4))
    added = torch.zeros(2, 4, 9, 60).masked_fill_(~allowed, -torch.inf)
    options = dict(scale=0.125, is_causal=False)
    expected = attention_8bit(*problem, mask=allowed, **options)
    for lowest in (-torch.inf, torch.finfo(torch.float32).min):
        added = torch.zeros(2, 4, 9, 60).masked_fill_(~allowed, lowest)
        assert torch.equal(attention_8bit(*problem, mask=added, **options), expected)
    assert not expected[0, 3, 1].any()
    for bad in (torch.ones(9, 59), torch.ones(9, 60, dtype=torch.int64), torch.ones(1, 2, 4, 9, 60)):
        with pytest.raises(FormatError, match="mask: expected boolean or floating point"):
            attention_8bit(*problem, mask=bad, **options)


def test_a_bounded_number_of_queries_at_a_time(monkeypatch):
    problem = make_problem(3, 4, 2, 50, 50, 64)
    mask = torch.randn(3, 1, 50, 50)
    options = dict(
        scale=0.125, key_start=int32(0, 9, 20), sinks=torch.randn(4), logit_offset=torch.randn(3, 4, 50)
    )
    expected = attention_8bit(*problem, mask=mask, **options).float()
    for numbers in (1, 4 * 50 * 7, 50_000):
        monkeypatch.setattr(attention_reference, "_CHUNK", numbers)
        y = attention_8bit(*problem, mask=mask, **options)
        # Other blocks of a product are other orders of sums.
        torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(bad):
    for name in ("query_scale", "key_scale", "value_scale", "logit_offset"):
        # Of an infinite logit only the sign would count. `rotate_quantize` makes NaN of such keys.
        if (name, bad) == ("key_scale", float("inf")):
            continue
        problem, logit_offset = make_problem(1, 2, 2, 40, 40, 64), torch.zeros(1, 2, 40)
        tensors = {**problem._asdict(), "logit_offset": logit_offset}
        tensors[name][0, 1, 30] = bad
        y = attention_8bit(*problem, scale=0.125, logit_offset=logit_offset)
        assert y[:, :, 0].isfinite().all(), "the other head"
        assert not y[:, 30:31, 1].isfinite().any()
        if name != "value_scale":
            assert y[:, :30, 1].isfinite().all(), "those who do not see it"


def test_nothing_to_do():
    for shape in ((0, 4, 2, 5, 7), (2, 4, 2, 0, 7), (2, 4, 2, 5, 0), (1, 0, 0, 5, 7), (2, 0, 2, 5, 7)):
        batch, heads, _, tokens, _ = shape
        y = attention_8bit(*make_problem(*shape, 64), scale=0.125, sinks=torch.zeros(heads))
        assert y.shape == (batch, tokens, heads, 64) and not y.any()


@pytest.mark.parametrize("dtype", [torch.int8, E4M3, torch.float32])
def test_order_of_tokens(dtype):
    values = torch.arange(3 * 37).reshape(3, 37).to(dtype)
    ordered = interleave_tokens(values)
    assert ordered.shape == (3, 48) and ordered.is_contiguous() and ordered.dtype == dtype
    for e, t, p in product(range(2), range(4), range(2)):
        expected = values[:, 16 + 8 * e + 2 * t + p]
        assert torch.equal(ordered[:, 16 + 4 * t + 2 * e + p].float(), expected.float())
    assert torch.equal(deinterleave_tokens(ordered, 37).float(), values.float())
    assert not deinterleave_tokens(ordered, 48)[:, 37:].float().any()


def test_opcheck():
    # Not "test_schema", which multiplies the 8-bit tensors.
    test_utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.hf_hadacore.attention_8bit
    vector, sinks, offset = int32(1, 2), torch.zeros(4), torch.zeros(2, 4, 3)
    for dtype, granularity, extras in [
        (torch.int8, "token", (None,) * 5),
        (E4M3, "block", (vector, vector + 140, vector + 137, sinks, offset)),
    ]:
        problem = make_problem(2, 4, 2, 3, 150, 64, dtype=dtype, granularity=granularity)
        mask = torch.ones(3, 150) if granularity == "block" else None
        opcheck(
            ops.default, (*problem, 0.125, True, 9, 2.0, *extras, torch.float16, mask), test_utils=test_utils
        )


def test_compiles_in_one_graph():
    def attend(*tensors):
        return attention_8bit(*tensors, scale=0.125)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for keys in (60, 150):
        problem = make_problem(2, 4, 2, 9, keys, 64)
        assert torch.equal(compiled(*problem), attend(*problem))


def test_missing_gradient_is_an_error():
    problem = make_problem(2, 4, 2, 9, 60, 64)
    problem.query_scale.requires_grad_()
    for mask in (None, torch.ones(9, 60)):
        with pytest.raises(UnsupportedError, match="no gradient"):
            attention_8bit(*problem, scale=0.125, mask=mask).sum().backward()


def test_refuses_what_does_not_fit():
    problem = make_problem(2, 4, 2, 9, 150, 64)
    q, k, v, q_scale, k_scale, v_scale = problem
    for change, message in [
        (dict(query=q.float()), "query: expected e4m3 or int8.*float32"),
        (dict(query=q[0]), r"query: .*\[B, Hq, Sq, D\].*\(4, 9, 64\)"),
        (dict(query=q.mT.contiguous().mT), "query: expected contiguous.*strides"),
        (dict(query=q[:, :3].contiguous()), "multiple of key's 2 heads, found 3"),
        (dict(key=k.float().to(torch.int8)), "key: expected torch.float8_e4m3fn.*found torch.int8"),
        (dict(key=k[..., :32].contiguous()), r"key: .*\[2, Hkv, L, 64\].*\(2, 2, 150, 32\)"),
        (dict(key=k[:, :, ::2]), "key: expected contiguous"),
        (dict(value=v.view(torch.int8)), "value: .*e4m3fn.*int8"),
        (dict(value=v[..., :150].contiguous()), r"value: .*\[2, 2, 64, 160\].*150\]"),
        (dict(query_scale=q_scale[:1]), r"query_scale.*\[2, 4, 9\]"),
        (dict(key_scale=k_scale.half()), "key_scale: .*float16"),
        (dict(key_scale=k_scale[..., :2].contiguous()), "value_scale.*128 tokens"),
        (dict(value_scale=v_scale[..., :2].contiguous()), "value_scale.*the same for keys and values"),
        (dict(key_start=torch.zeros(2)), "key_start: expected contiguous torch.int32.*float32"),
        (dict(key_end=int32(1)), r"key_end: .*\[2\], found.*\[1\]"),
        (dict(query_start=int32(1, 2, 3)), "query_start"),
        (dict(sinks=torch.zeros(2)), r"sinks: .*\[4\]"),
        (dict(logit_offset=torch.zeros(2, 4)), "logit_offset"),
        (dict(sinks=torch.zeros(4, device="meta")), "sinks: expected it on cpu.*meta"),
        (dict(scale=float("nan")), "scale: expected a finite number"),
        (dict(window=-1), "window.*-1"),
        (dict(softcap=-2.0), "softcap.*-2"),
        (dict(out_dtype=torch.float32), "out_dtype.*float32"),
    ]:
        with pytest.raises(FormatError, match=message):
            attention_8bit(**{**problem._asdict(), "scale": 0.125, **change})
