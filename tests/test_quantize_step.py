"""quantize_step_into_cache: on the CPU, interpreted, and compiled for Hopper."""

import re
from typing import Any

import pytest
import torch
from interpreted import run_interpreted

from hf_hadacore.errors import FormatError, UnsupportedError
from hf_hadacore.kernels.quantize_step import quantize_step_into_cache
from hf_hadacore.kernels.rotate_quantize import rotate_quantize, rotate_quantize_into_cache

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
B, HEADS, KEY_HEADS, ROOM, D = 2, 4, 2, 20, 64


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(tokens: int = 3, dtype: torch.dtype = E4M3, position: Any = 5) -> dict[str, torch.Tensor]:
    shapes = [(B, tokens, heads, D) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    q, k, v = (random(*shape, seed=seed).transpose(1, 2) for seed, shape in enumerate(shapes))
    return dict(
        q=q,
        k=k,
        v=v,
        keys=torch.zeros(B, KEY_HEADS, ROOM, D).to(dtype),
        values=torch.zeros(B, KEY_HEADS, D, 32).to(E4M3),
        key_scale=torch.zeros(B, KEY_HEADS, ROOM),
        value_scale=torch.zeros(B, KEY_HEADS, ROOM),
        position=torch.tensor([position]),
    )


def front(batch: int = 1, tokens: int = 3, width: int = D) -> dict[str, torch.Tensor]:
    angles = random(batch, tokens, width, seed=9).float()
    constant = random(batch, KEY_HEADS, D, dtype=torch.float32, seed=8)
    return dict(constant=constant, cos=angles.cos().bfloat16(), sin=angles.sin().bfloat16())


def three_calls(q, k, v, keys, values, key_scale, value_scale, position, constant=None, cos=None, sin=None):
    rotate_quantize_into_cache(k, keys, key_scale, position, offset=constant, cos=cos, sin=sin)
    form = dict(rotate=False, transpose=True, interleave=True, power_of_2=True)
    rotate_quantize_into_cache(v, values, value_scale, position, **form)
    return rotate_quantize(q, dtype=keys.dtype, cos=cos, sin=sin)


def assert_same(arguments: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    for name in ("keys", "values", "key_scale", "value_scale"):
        assert arguments[name].float().any()
        assert torch.equal(arguments[name].float(), others[name].float()), name


@pytest.mark.parametrize("dtype", [E4M3, INT8])
@pytest.mark.parametrize("options", [{}, front(), front(B, width=D // 2)], ids=["plain", "front", "half"])
def test_is_the_three_calls(dtype, options):
    step, three = inputs(dtype=dtype), inputs(dtype=dtype)
    query, query_scale = quantize_step_into_cache(**step, **options)
    expected, expected_scale = three_calls(**three, **options)
    assert query.dtype == dtype and torch.equal(query.float(), expected.float())
    assert torch.equal(query_scale, expected_scale)
    assert_same(step, three)


def test_dtypes_may_differ():
    step, three = inputs(), inputs()
    for arguments in (step, three):
        arguments["q"], arguments["k"] = arguments["q"].half(), arguments["k"].float()
    for ours, expected in zip(quantize_step_into_cache(**step), three_calls(**three), strict=True):
        assert torch.equal(ours.float(), expected.float())
    assert_same(step, three)


@pytest.mark.parametrize("batch", [1, B])
def test_each_sequence_has_its_position(batch):
    starts = [9, 2]
    step, options = inputs(), front(batch)
    query, _ = quantize_step_into_cache(
        **step | dict(position=torch.tensor(starts, dtype=torch.int32)), **options
    )
    apart = inputs()
    for b, start in enumerate(starts):
        one = {name: t[b : b + 1] for name, t in apart.items() if name != "position"}
        of_one = {name: t[b % batch : b % batch + 1] for name, t in options.items()}
        expected, _ = three_calls(**one, position=torch.tensor([start]), **of_one)
        assert torch.equal(query[b : b + 1].float(), expected.float())
    assert_same(step, apart)


def test_tokens_beyond_the_capacity():
    with pytest.raises(IndexError):
        quantize_step_into_cache(**inputs(position=ROOM - 2))


def test_opcheck():
    op = torch.ops.hf_hadacore.quantize_step_into_cache.default
    for arguments, options in (
        (inputs(1, INT8), dict.fromkeys(("constant", "cos", "sin"))),
        (inputs(dtype=INT8) | dict(position=torch.tensor([4, 1], dtype=torch.int32)), front(B)),
    ):
        # Not every operation that compares knows 8-bit floats.
        arguments["values"] = arguments["values"].to(INT8)
        torch.library.opcheck(op, (*arguments.values(), *options.values()))


def test_refuses_what_does_not_fit():
    good, angles = inputs(), front()
    for wrong in (
        dict(q=good["q"][0]),
        dict(q=good["q"][:, :, :2]),
        dict(q=good["q"].double()),
        dict(k=good["k"][..., :32]),
        dict(v=good["v"][:, :1]),
        dict(keys=good["keys"].float()),
        dict(keys=good["keys"].mT.contiguous().mT),
        dict(values=good["values"][..., :20].contiguous()),
        dict(key_scale=good["key_scale"].half()),
        dict(value_scale=good["value_scale"][..., :19]),
        dict(position=good["position"].int()),
        dict(position=torch.zeros(B, dtype=torch.int64)),
        dict(position=good["position"].to("meta")),
        dict(constant=angles["constant"][0]),
        dict(constant=angles["constant"].bfloat16()),
        dict(cos=angles["cos"]),
        dict(cos=angles["cos"][:, :2], sin=angles["sin"][:, :2]),
        dict(cos=angles["cos"][..., :16], sin=angles["sin"][..., :16]),
    ):
        # What was found is in the message.
        (name, tensor), *_ = wrong.items()
        found = re.escape(f"{name} {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}")
        with pytest.raises(FormatError, match=f"expected, on one device, q .*; found .*{found}"):
            quantize_step_into_cache(**good | wrong)
    small = {name: good[name][..., :6] for name in ("q", "k", "v")}
    buffers = dict(keys=good["keys"][..., :6].contiguous(), values=good["values"][:, :, :6].contiguous())
    with pytest.raises(UnsupportedError, match="order 6"):
        quantize_step_into_cache(**good | small | buffers)


def test_interpreted():
    pytest.importorskip("triton")
    assert "interpreted quantize_step" in run_interpreted("interpret_quantize_step.py")


def compile_kernel(
    capability: int,
    keys: torch.dtype = E4M3,
    dtype: torch.dtype = torch.bfloat16,
    d: int = 128,
    rope: str = "",
    has_constant: bool = True,
    per_sequence: bool = False,
) -> dict[str, Any]:
    from offline import compile_for

    from hf_hadacore.kernels import quantize_step_triton
    from hf_hadacore.kernels.rotate_quantize_triton import OPTIONS, padded_half

    q_split = dtype == torch.float32 or (dtype == torch.float16 and bool(rope))
    k_split = dtype == torch.float32 or (dtype == torch.float16 and (bool(rope) or has_constant))
    has_pdl = capability >= 90
    arguments = dict(
        **dict.fromkeys(("p_q", "p_k", "p_v"), dtype),
        **dict.fromkeys(("p_cos", "p_sin"), dtype if rope else None),
        p_constant=torch.float32 if has_constant else None,
        p_q_matrix=torch.bfloat16 if q_split else dtype,
        p_k_matrix=torch.bfloat16 if k_split else dtype,
        p_position=torch.int32 if per_sequence else torch.int64,
        p_query=keys,
        p_keys=keys,
        p_values=E4M3,
        **dict.fromkeys(("p_query_scale", "p_key_scale", "p_value_scale"), torch.float32),
        **dict.fromkeys(("tokens", "room"), "i32"),
        columns="i32:16",
        **{f"s_{name}": "i32:16" for name in ("qb", "qh", "qt", "kb", "kh", "kt", "vb", "vh", "vt")},
        **{f"s_{name}": "i32:16" for name in ("cb", "ct", "ob")},
        D=d,
        PADDED=padded_half(d),
        TILE=16,
        HEADS=32,
        KEY_HEADS=8,
        PER_SEQUENCE=per_sequence,
        LARGEST_KEY=127.0 if keys == INT8 else 448.0,
        LARGEST_VALUE=448.0,
        SMALLEST=1,
        ONE_HALF=rope == "half",
        Q_SPLIT=q_split,
        K_SPLIT=k_split,
        PDL=has_pdl,
    )
    kernel = quantize_step_triton._quantize_step_kernel
    return compile_for(capability, kernel, arguments, num_warps=4 if d <= 128 else 8, **OPTIONS[has_pdl])


@pytest.mark.parametrize(
    "variant",
    [
        dict(),
        dict(keys=INT8, per_sequence=True),
        dict(rope="half"),
        dict(dtype=torch.float16, d=64),
        dict(dtype=torch.float16, d=80, rope="whole", has_constant=False),
        dict(d=256, keys=INT8),
        dict(d=96),
        dict(dtype=torch.float32),
    ],
    ids=str,
)
def test_on_hopper(tmp_path, variant):
    pytest.importorskip("triton")
    from offline import resources

    from hf_hadacore.kernels.rotate_quantize_triton import padded_half

    asm = compile_kernel(90, **variant)
    assert resources(asm["cubin"], tmp_path).stack == 0, "registers are spilled"
    ptx = asm["ptx"]
    assert "cvt.rn.satfinite.e4m3x2" in ptx and "mma.sync" in ptx
    # Before the kernel before has ended only the matrix is read, 16 bytes at a time: for q and k.
    d = variant.get("d", 128)
    padded = padded_half(d)
    nbytes = (4 if d & (d - 1) else 1) * padded**2 * 2
    reads = nbytes // (16 * 32 * (4 if d <= 128 else 8))
    waits = [part.rsplit("st.global", 1)[-1] for part in ptx.split("griddepcontrol.wait")[:-1]]
    assert [part.count("ld.global") for part in waits] == [reads, reads, 0]
    assert "griddepcontrol.launch_dependents" in waits[0]
    # After that everything is asked for before any of it is worked on, in all three branches.
    for part in ptx.split("griddepcontrol.wait")[1:]:
        branch = part[: part.index("st.global")]
        assert "ld.global" in branch
        assert "ld.global" not in branch[branch.index("st.shared") :]


@pytest.mark.parametrize("capability", [89, 100])
def test_on_others(capability):
    pytest.importorskip("triton")
    ptx = compile_kernel(capability, rope="half")["ptx"]
    assert ("griddepcontrol.wait" in ptx) == (capability >= 90)
