"""The op `hf_hadacore::quantize_step_into_cache`: q, k and v of a decoding step for 8-bit attention."""

from typing import Any

import torch

from ..errors import FormatError
from ..hadamard_matrices import hadamard_factors
from .launcher import goes_straight, on_device
from .rotate_quantize import SMALLEST_MAXIMUM, has_kernel, rotate_quantize, rotate_quantize_into_cache
from .rotate_quantize_checks import LARGEST, whole_rows

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

torch.library.define(
    "hf_hadacore::quantize_step_into_cache",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) key_scale, "
    "Tensor(d!) value_scale, Tensor position, Tensor? constant, Tensor? cos, Tensor? sin) "
    "-> (Tensor, Tensor)",
)


def quantize_step_into_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    position: torch.Tensor,
    *,
    constant: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotate_quantize` of q, and `rotate_quantize_into_cache` of k and v, with scales per token.

    v is neither turned nor rotated; it is stored transposed and interleaved, with scales that are powers of
    two. Not differentiable. On CUDA up to 16 tokens are one launch, for D up to 128 and for 256.

    The position is read on the device, so that a CUDA graph can be replayed. Tokens beyond the capacity are
    dropped on CUDA; the CPU raises IndexError.

    Args:
        q: fp16, bf16 or fp32 ``[B, Hq, S, D]``, any strides, D even.
        k, v: fp16, bf16 or fp32 ``[B, Hkv, S, D]``, any strides.
        keys: torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8 ``[B, Hkv, capacity, D]``, contiguous.
        values: of the same dtypes ``[B, Hkv, D, capacity rounded up to a multiple of 16]``, contiguous.
        key_scale, value_scale: fp32 ``[B, Hkv, capacity]``, contiguous.
        position: where the first of the S tokens goes: int64, one element, or int32 ``[B]``.
        constant: fp32 ``[B or 1, Hkv, D]``, subtracted from k after RoPE.
        cos, sin: of rotary embeddings of q and k, ``[B or 1, S, D or D/2]`` as in `rotate_quantize`.

    Returns:
        q in the dtype of keys, ``[B, Hq, S, D]``, contiguous, and its scales, fp32 ``[B, Hq, S]``.

    Raises:
        FormatError: an argument does not fit.
        UnsupportedError: there is no Hadamard matrix of order D.
    """
    op = _cuda if goes_straight(q) else torch.ops.hf_hadacore.quantize_step_into_cache
    return op(q, k, v, keys, values, key_scale, value_scale, position, constant, cos, sin)


def _check(q, k, v, keys, values, key_scale, value_scale, position, constant, cos, sin) -> None:
    # In one expression, because it runs for every layer and token; what is wrong is found out afterwards.
    shape, room = k.shape, key_scale.shape
    fits = (
        len(q.shape) == len(shape) == 4
        and len(room) == 3
        and (q.shape[0], *q.shape[2:]) == (shape[0], *shape[2:])
        and shape[3] > 0
        and shape[3] % 2 == 0
        and v.shape == shape
        and all(x.dtype in _FLOATS for x in (q, k, v))
        and room[:2] == shape[:2]
        and keys.shape == (*room, shape[3])
        and values.shape == (*room[:2], shape[3], whole_rows(room[2]))
        and value_scale.shape == room
        and keys.dtype in LARGEST
        and values.dtype in LARGEST
        and key_scale.dtype == value_scale.dtype == torch.float32
        and all(tensor.is_contiguous() for tensor in (keys, values, key_scale, value_scale))
        and (
            (position.dtype == torch.int64 and position.numel() == 1)
            or (position.dtype == torch.int32 and position.shape == shape[:1])
        )
        and position.is_contiguous()
    )
    if fits and constant is not None:
        fits = constant.dtype == torch.float32 and constant.shape in (
            (1, shape[1], shape[3]),
            (shape[0], shape[1], shape[3]),
        )
    if fits and (cos is not None or sin is not None):
        fits = (
            cos is not None
            and sin is not None
            and cos.dtype == sin.dtype
            and cos.dtype in _FLOATS
            and cos.shape == sin.shape
            and len(cos.shape) == 3
            and cos.shape[0] in (1, shape[0])
            and cos.shape[1] == shape[2]
            and cos.shape[2] in (shape[3], shape[3] // 2)
        )
    rest = (k, v, keys, values, key_scale, value_scale, position, constant, cos, sin)
    if not fits or any(tensor.device != q.device for tensor in rest if tensor is not None):
        names = ("k", "v", "keys", "values", "key_scale", "value_scale", "position", "constant", "cos", "sin")
        found = [("q", q), *zip(names, rest, strict=True)]
        raise FormatError(
            "expected, on one device, q [B, Hq, S, D] with even D, k and v [B, Hkv, S, D], each fp16, bf16 "
            "or fp32; contiguous keys [B, Hkv, capacity, D] and values [B, Hkv, D, capacity rounded up to a "
            f"multiple of 16], each of one of {', '.join(map(str, LARGEST))}; contiguous fp32 key_scale and "
            "value_scale [B, Hkv, capacity]; position int64 [1] or int32 [B]; constant fp32 [B or 1, Hkv, D] "
            "or none; both or neither of cos and sin, floating point [B or 1, S, D or D/2]; found "
            + ", ".join(
                f"{name} {t.dtype} {tuple(t.shape)} on {t.device}" for name, t in found if t is not None
            )
        )
    # A symbolic size of a traced graph has no hash.
    hadamard_factors(int(shape[3]))


def _three_calls(q, k, v, keys, values, key_scale, value_scale, position, constant, cos, sin):
    """The specification."""
    form: dict[str, Any] = dict(rotate=False, transpose=True, interleave=True, power_of_2=True)
    positions = position.long().view(-1, 1)
    # Sequences that have a position of their own are written one by one.
    parts = [slice(None)] if len(positions) == 1 else [slice(b, b + 1) for b in range(len(q))]
    for part, start in zip(parts, positions, strict=True):
        offset, *angles = (t if t is None or len(t) == 1 else t[part] for t in (constant, cos, sin))
        front = dict(offset=offset, cos=angles[0], sin=angles[1])
        rotate_quantize_into_cache(k[part], keys[part], key_scale[part], start, **front)
        rotate_quantize_into_cache(v[part], values[part], value_scale[part], start, **form)
    return rotate_quantize(q, dtype=keys.dtype, cos=cos, sin=sin)


@torch.library.register_fake("hf_hadacore::quantize_step_into_cache")
def _fake(q, k, v, keys, *rest):
    _check(q, k, v, keys, *rest)
    return q.new_empty(q.shape, dtype=keys.dtype), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.impl("hf_hadacore::quantize_step_into_cache", "default")
def _anywhere(*arguments):
    _check(*arguments)
    return _three_calls(*arguments)


def _fits(q: torch.Tensor, *dtypes: torch.dtype) -> bool:
    from .quantize_step_triton import fits

    return q.numel() > 0 and all(has_kernel(q, dtype) for dtype in dtypes) and fits(q)


def _cuda(q, k, v, keys, values, key_scale, value_scale, position, constant, cos, sin):
    arguments = (q, k, v, keys, values, key_scale, value_scale, position, constant, cos, sin)
    _check(*arguments)
    if not _fits(q, keys.dtype, values.dtype):
        return _three_calls(*arguments)
    from . import quantize_step_triton

    if cos is not None and (cos.stride() != sin.stride() or cos.stride(-1) != 1):
        cos, sin = cos.contiguous(), sin.contiguous()
    query = torch.empty(q.shape, dtype=keys.dtype, device=q.device)
    query_scale = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    with on_device(q.device):
        quantize_step_triton.launch(
            *arguments[:8],
            query,
            query_scale,
            largest_key=LARGEST[keys.dtype],
            largest_value=LARGEST[values.dtype],
            smallest=SMALLEST_MAXIMUM,
            constant=constant if constant is None else constant.contiguous(),
            cos=cos,
            sin=sin,
        )
    return query, query_scale


torch.library.impl("hf_hadacore::quantize_step_into_cache", "cuda", _cuda)
