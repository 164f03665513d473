"""The mean of keys: the op on the CPU, and its kernel without a GPU, interpreted and compiled."""

import re

import pytest
import torch
from interpreted import run_interpreted
from key_mean_cases import LAYOUTS, in_bounds, random_key, random_tokens

from hf_hadacore.errors import FormatError
from hf_hadacore.kernels.key_mean import key_mean

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_of_tokens(dtype, layout):
    torch.manual_seed(0)
    key = random_key((2, 3, 300, 96), dtype, layout)
    mean = key_mean(key)
    assert mean.dtype == torch.float32 and mean.shape == (2, 3, 96) and mean.is_contiguous()
    assert in_bounds(mean, key, None) <= 1
    for batch in (1, 2):
        is_token = random_tokens(batch, 300)
        padded = key.masked_fill(~is_token[:, None, :, None], float("nan"))
        mean = key_mean(padded, is_token)
        assert in_bounds(mean, key, is_token) <= 1
        assert not mean[~is_token.any(1).expand(2)].any()


@pytest.mark.parametrize("shape", [(2, 3, 0, 64), (0, 3, 5, 64), (2, 0, 5, 64)])
def test_the_mean_of_nothing_is_0(shape):
    key = torch.ones(shape)
    for is_token in (None, torch.ones(shape[0], shape[2], dtype=torch.bool)):
        assert torch.equal(key_mean(key, is_token), torch.zeros(*shape[:2], 64))


@pytest.mark.parametrize(
    ("key", "is_token", "message"),
    [
        (torch.ones(2, 3, 4), None, r"key: expected fp16, bf16 or fp32 \[B, H, S, D\]"),
        (torch.ones(2, 3, 4, 8, dtype=torch.float64), None, "found torch.float64"),
        (torch.ones(2, 3, 4, 8), torch.ones(2, 4), r"is_token: expected boolean \[2 or 1, 4\] on cpu"),
        (torch.ones(2, 3, 4, 8), torch.ones(2, 5).bool(), r"found torch.bool \(2, 5\)"),
        (torch.ones(2, 3, 4, 8), torch.ones(3, 4).bool(), r"found torch.bool \(3, 4\)"),
        (torch.ones(2, 3, 4, 8), torch.ones(4).bool(), r"found torch.bool \(4,\)"),
        (torch.ones(2, 3, 4, 8), torch.ones(2, 4).bool().to("meta"), "on cpu, found .* on meta"),
    ],
)
def test_bad_input(key, is_token, message):
    with pytest.raises(FormatError, match=message):
        key_mean(key, is_token)


def test_opcheck():
    for layout in LAYOUTS:
        key = random_key((2, 3, 5, 8), torch.bfloat16, layout)
        for is_token in (None, random_tokens(1, 5), random_tokens(2, 5)):
            torch.library.opcheck(torch.ops.hf_hadacore.key_mean.default, (key, is_token))


def test_programs_fill_the_gpu_and_none_is_idle():
    choose_splits = pytest.importorskip("hf_hadacore.kernels.key_mean_triton").choose_splits
    for heads in (1, 8, 32, 100, 600):
        for tiles in (1, 2, 63, 128, 129, 1000):
            splits = choose_splits(heads, tiles, 132)
            rounds = -(-tiles // splits)
            assert (splits - 1) * rounds < tiles
            # Fewer only where there are no more tiles, or as many rounds would be needed all the same.
            assert splits * heads <= max(528, heads)
            assert rounds == -(-tiles // max(1, min(tiles, 528 // heads)))
    assert choose_splits(8, 128, 132) == 64


def test_interpreted():
    pytest.importorskip("triton")
    assert "interpreted key_mean" in run_interpreted("interpret_key_mean.py")


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("d", [80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_to_wide_loads_of_a_whole_tile(capability, dtype, d, is_split, has_mask, tmp_path):
    pytest.importorskip("triton")
    from offline import compile_for, resources

    from hf_hadacore.kernels import key_mean_triton
    from hf_hadacore.kernels.launcher import power_of_2

    tile, rows = key_mean_triton.tile_of(d, dtype.itemsize)
    has_pdl = capability >= 90
    arguments = dict(
        p_key=dtype,
        p_is_token="*i1:16" if has_mask else None,
        p_out=torch.float32,
        p_partials=torch.float32 if is_split else None,
        p_arrived=torch.int32 if is_split else None,
        tokens="i32",
        heads="i32",
        s_kb="i32:16",
        s_kh="i32:16",
        s_kt="i32:16",
        s_mb="i32:16",
        D=d,
        D_BLOCK=power_of_2(d),
        TILE=tile,
        ROWS=rows,
        CHUNK=key_mean_triton._COMBINED // power_of_2(d),
        IS_SPLIT=is_split,
        PDL=has_pdl,
    )
    options = key_mean_triton._OPTIONS[has_pdl]
    asm = compile_for(capability, key_mean_triton._key_mean_kernel, arguments, num_warps=4, **options)
    ptx = asm["ptx"]
    # All of a tile's loads are asked for before anything is added up.
    asked = re.split(r"add(\.rn)?\.f32", ptx)[0]
    assert asked.count("ld.global.v4.b32") == tile // rows == 8
    if has_pdl:
        launch, wait = (ptx.find(f"griddepcontrol.{name}") for name in ("launch_dependents", "wait"))
        assert 0 < launch < wait < ptx.find("ld.global")
        assert "bra" not in ptx[:wait]
    else:
        assert "griddepcontrol" not in ptx
    needed = resources(asm["cubin"], tmp_path)
    assert needed.stack == 0
    # Four programs of four warps on a processor.
    assert needed.registers <= 128
