"""8-bit attention in float64: problems, what they amount to, and how far off a result may be."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from hf_hadacore.kernels.attention_reference import BLOCK_SIZE, P_SCALE, interleave_tokens

E4M3 = torch.float8_e4m3fn
DISTRIBUTIONS = ("normal", "outlier", "channel", "aligned")
# e4m3: half of a step relative to a normal number, and half of the step of subnormal ones.
_P_ROUNDOFF, _P_SMALLEST = 2.0**-4, 2.0**-10
# Numbers that are looked at at a time.
_CHUNK = 1 << 24


def make_inputs(
    name: str, heads: int, key_heads: int, tokens: int, d: int, seed: int = 0, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 q, k, v ``[1, heads, tokens, d]`` of one of `DISTRIBUTIONS`.

    outlier is N(0, 1) + N(0, 100) Bernoulli(0.001), FlashAttention-3's (arXiv:2407.08608, section 4.3). In
    the others two channels of K have a large constant, and two channels of Q are large: others than K's
    in "channel", where V's channels differ in size, and K's own in "aligned".
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).double()

    def draw(count: int) -> torch.Tensor:
        x = randn(1, count, tokens, d)
        if name == "outlier":
            is_hit = torch.rand(x.shape, generator=generator) < 1e-3
            x += 10 * randn(*x.shape) * is_hit
        return x

    q, k, v = draw(heads), draw(key_heads), draw(key_heads)
    if name in ("channel", "aligned"):
        k[..., [3, d // 2 + 3]] += torch.tensor([60.0, -25.0], dtype=torch.float64)
    if name == "channel":
        q[..., [7, d // 2 + 7]] *= torch.tensor([12.0, 6.0], dtype=torch.float64)
        v *= (0.7 * randn(1, key_heads, 1, d)).exp()
    elif name == "aligned":
        q[..., [3, d // 2 + 3]] *= 6
    q, k, v = (x.bfloat16().to(device) for x in (q, k, v))
    return q, k, v


class Problem(NamedTuple):
    """The tensors of `attention_8bit`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_scale: torch.Tensor
    key_scale: torch.Tensor
    value_scale: torch.Tensor


def make_problem(
    batch: int,
    heads: int,
    key_heads: int,
    tokens: int,
    keys: int,
    d: int,
    *,
    dtype: torch.dtype = E4M3,
    granularity: str = "token",
    value_mean: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
) -> Problem:
    """Random operands as `rotate_quantize` makes them of numbers like N(0, 1).

    Args:
        batch, heads, key_heads, tokens, keys, d: B, Hq, Hkv, Sq, L, D.
        dtype: of query and key.
        granularity: of the scales of keys and values, "token" or "block".
        value_mean: of V.
        seed: of the numbers.
        device: where they are made.
    """
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = dict(generator=generator, device=device)
    largest = 30.0 if dtype == torch.int8 else 100.0

    def operand(count: int, length: int) -> torch.Tensor:
        x = torch.randn(batch, count, length, d, **options) * largest
        return (x.round().clamp(-127, 127) if dtype == torch.int8 else x.clamp(-448, 448)).to(dtype)

    query, key = operand(heads, tokens), operand(key_heads, keys)
    parts = keys if granularity == "token" else -(-keys // BLOCK_SIZE)
    query_scale = (0.5 + torch.rand(batch, heads, tokens, **options)) / largest
    key_scale = (0.5 + torch.rand(batch, key_heads, parts, **options)) / largest
    value_scale = torch.randint(-8, -4, (batch, key_heads, parts), **options).float().exp2()
    value = torch.randn(batch, key_heads, keys, d, **options) + value_mean
    value = (value / _per_token(value_scale, keys)[..., None]).clamp(-448, 448).to(E4M3)
    return Problem(query, key, interleave_tokens(value.mT), query_scale, key_scale, value_scale)


def _per_token(scale: torch.Tensor, keys: int) -> torch.Tensor:
    size = 1 if scale.shape[2] == keys else BLOCK_SIZE
    return scale.repeat_interleave(size, 2)[..., :keys]


class Exact(NamedTuple):
    """Attention in float64, ``[B, Sq, Hq, D]``, and how far off a result may be before it is rounded.

    Attributes:
        out: with exact P.
        bound: around `out`, for rounding P, products and fp32 sums.
        rounded: with P rounded to e4m3 as the specification has it.
        rounded_bound: around `rounded`, for products and fp32 sums, which also move a P across a tie.
    """

    out: torch.Tensor
    bound: torch.Tensor
    rounded: torch.Tensor
    rounded_bound: torch.Tensor


def exact_attention(
    problem: Problem,
    *,
    scale: float,
    is_causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    key_start: torch.Tensor | None = None,
    key_end: torch.Tensor | None = None,
    query_start: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    logit_offset: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    product_roundoff: float = 0.0,
) -> Exact:
    """What `attention_8bit` is held to, a head and some queries at a time.

    Args:
        problem: the operands.
        scale, is_causal, window, softcap, key_start, key_end, query_start, sinks, logit_offset, mask: as in
            `attention_8bit`.
        product_roundoff: of the tensor cores' sums, relative to the sum of magnitudes; on top of what fp32
            costs.
    """
    batch, heads, tokens, d = problem.query.shape
    key_heads, keys = problem.key.shape[1:3]
    device = problem.query.device
    shape = (batch, tokens, heads, d)
    exact = Exact(*(torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(4)))
    key_scale, value_scale = (_per_token(x, keys) for x in (problem.key_scale, problem.value_scale))
    n = torch.arange(keys, device=device)
    rows = max(1, _CHUNK // max(keys, 1))
    pieces = [slice(start, min(tokens, start + rows)) for start in range(0, tokens, rows)]
    for b, h, piece in itertools.product(range(batch), range(heads), pieces):
        j = h * key_heads // heads
        first = keys - tokens if query_start is None else query_start[b]
        position = first + torch.arange(piece.start, piece.stop, device=device)[:, None]
        there = n >= (0 if key_start is None else key_start[b])
        there = there & (n < (keys if key_end is None else key_end[b]))
        seen = there.expand(len(position), keys)
        seen = seen & (n <= position) if is_causal else seen
        seen = seen & (n > position - window) if window else seen
        added = None
        if mask is not None:
            added = mask.expand(batch, heads, tokens, keys)[b, h, piece]
            if mask.dtype == torch.bool:
                seen, added = seen & added, None

        q = problem.query[b, h, piece].double() * problem.query_scale[b, h, piece, None].double()
        k = problem.key[b, j].double() * key_scale[b, j, :, None].double()
        v = problem.value[b, j].unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-3).flatten(-2)
        v = v[:, :keys].mT.double() * value_scale[b, j, :, None].double()
        v = torch.where(there[:, None], v, 0)
        logit = scale * (q @ k.T)
        # What products, scales and fp32 numbers of this size put into a logit.
        error = (product_roundoff + (d + 16) * 2.0**-24) * abs(scale) * (q.abs() @ k.abs().T)
        if logit_offset is not None:
            offset = logit_offset[b, h, piece, None].double()
            logit, error = logit + offset, error + 2.0**-22 * offset.abs()
        if softcap:
            logit, error = softcap * torch.tanh(logit / softcap), error + 2.0**-21 * softcap
        if added is not None:
            logit, error = logit + added.double(), error + 2.0**-22 * added.double().abs()
        t = (logit * math.log2(math.e)).masked_fill(~seen, -math.inf)
        m = t.amax(-1, keepdim=True)
        m = torch.where(m == -math.inf, 0.0, m)
        p = torch.exp2(t - m)
        denominator = p.sum(-1, keepdim=True)
        if sinks is not None:
            denominator = denominator + torch.exp2(sinks[h].double() * math.log2(math.e) - m)
        denominator = torch.where(denominator == 0, 1.0, denominator)

        in_range = torch.where(there, value_scale[b, j], 0).double()
        largest = torch.cat([part.amax().expand(len(part)) for part in in_range.split(BLOCK_SIZE)])
        # One where it does not matter, because nobody sees anything.
        ratio = torch.where(in_range > 0, in_range / largest, 1)
        # Both p and the denominator are off by what t is off by: 2^x - 1 < x for these x.
        error = torch.where(p > 0, error, 0).amax(-1, keepdim=True)
        relative = 2.1 * error * math.log2(math.e) + (keys + 8) * 2.0**-24
        relative = relative + product_roundoff
        rounded, low, high = (_round_p(p * x, ratio) for x in (1, 1 - relative, 1 + relative))
        # Scales may also be relative to the largest of all blocks.
        of_all = torch.where(in_range > 0, in_range / in_range.amax(), 1)
        smallest = torch.minimum(p, _P_SMALLEST / P_SCALE / of_all)
        sums = 1.1 * relative * (p @ v.abs())
        exact.out[b, piece, h] = p @ v / denominator
        exact.bound[b, piece, h] = ((p * _P_ROUNDOFF + smallest) @ v.abs() + sums) / denominator
        exact.rounded[b, piece, h] = rounded @ v / denominator
        exact.rounded_bound[b, piece, h] = ((high - low) @ v.abs() + sums) / denominator
    return exact


def _round_p(p: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    return (p * ratio * P_SCALE).float().to(E4M3).double() / ratio / P_SCALE


def is_within_bounds(out: torch.Tensor, exact: Exact, is_specification: bool = False) -> bool:
    """Whether every element is as close to what is exact as it has to be.

    Args:
        out: a result.
        exact: what it should be.
        is_specification: whether it also has to round P as the specification does where that is subnormal.
    """
    finfo = torch.finfo(out.dtype)
    pairs = [(exact.out, exact.bound), (exact.rounded, exact.rounded_bound)]
    for expected, bound in pairs if is_specification else pairs[:1]:
        allowed = bound + finfo.eps / 2 * (expected.abs() + bound) + finfo.smallest_normal * finfo.eps
        if not bool(((out.double() - expected).abs() <= allowed).all()):
            return False
    return True


def masks(batch: int, tokens: int, keys: int, device: str = "cpu") -> Iterator[dict[str, torch.Tensor]]:
    """key_start, key_end and query_start: padding on every side, a whole prefill and a chunk of one."""

    def vector(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    starts = vector([(5 + 11 * b) % keys for b in range(batch)])
    ends = vector([keys - 3 * b for b in range(batch)])
    # A chunk that ends before what the cache can hold.
    middles = vector([max(1, 2 * keys // 3 - b) for b in range(batch)])
    yield {}
    yield {"key_start": starts}
    yield {"key_end": ends, "query_start": ends - tokens}
    yield {"key_end": middles, "query_start": middles - tokens}
    yield {"key_start": starts, "key_end": ends, "query_start": ends - tokens}
