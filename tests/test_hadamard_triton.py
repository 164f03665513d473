"""The Hadamard kernels without a GPU: emulated for their results, compiled for what they become."""

import re
from itertools import groupby, product
from math import prod

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
from gluon_emulator import emulate
from kernel_helpers import in_floors
from offline import compile_for, resources

from hf_hadacore.errors import UnsupportedError
from hf_hadacore.hadamard_matrices import hadamard_factors, hadamard_matrix
from hf_hadacore.kernels import hadamard_gluon, hadamard_hopper, hadamard_triton
from hf_hadacore.kernels import hadamard_schedules as schedules
from hf_hadacore.kernels.hadamard_layouts import (
    input_layout,
    make_plan,
    permutation,
    result_layout,
    tile_shape,
)

POWERS = (1, 2, 8, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
OTHERS = (12, 24, 80, 96, 112, 192, 576, 768, 1152, 3072, 4864, 5120, 8960, 9216)
LONG_OTHERS = (11008, 13824, 14336, 18944, 28672)
# Leading factors, then rows.
SEVERAL_PASSES = (29568, 53248, 65536)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """`launch` on CPU tensors."""

    def permute(b_x, source, target):
        return b_x.permute(permutation(source, target))

    def run(kernel, tensors, sizes, constants, programs, num_warps):
        emulate(kernel, (*tensors, *sizes), (*constants, False), programs, num_warps, permute=permute)

    monkeypatch.setattr(hadamard_triton, "_run", run)
    monkeypatch.setattr(hadamard_triton, "_has_kernel", lambda device: True)
    # Few, so that programs that stay have several tiles.
    monkeypatch.setattr(hadamard_triton, "processors_of", lambda index: 1)


def exact_transform(x: torch.Tensor, n: int, transpose: bool = False) -> torch.Tensor:
    """H x per row in float64, one Kronecker factor after the other."""
    y, inner = x.double(), n
    for order in hadamard_factors(n):
        for part in [2] * (order.bit_length() - 1) if order & (order - 1) == 0 else [order]:
            inner //= part
            matrix = hadamard_matrix(part).double()
            y = (matrix.T if transpose else matrix) @ y.reshape(-1, part, inner)
    return y.reshape(x.shape)


def random_rows(rows: int, n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def transformed(x: torch.Tensor, **options) -> torch.Tensor:
    n = x.shape[1]
    out = torch.full(x.shape, float("nan"), dtype=x.dtype)
    hadamard_triton.launch(x, out, factors=hadamard_factors(n), scale=n**-0.5, **options)
    return out


def rows_for(n: int) -> int:
    """More than one program has, and not a multiple."""
    return max(3, min(300, 5000 // n))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", POWERS + OTHERS + LONG_OTHERS + SEVERAL_PASSES)
def test_one_rounding(n, dtype):
    x = random_rows(rows_for(n), n, dtype)
    exact = exact_transform(x, n) * n**-0.5
    y = transformed(x)
    if n < 4:  # results that are exact have no floor
        assert torch.allclose(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)
    else:
        assert in_floors(y, exact) <= (4 if dtype == torch.float32 else 1.01)


@pytest.mark.parametrize("n", [128, 256, 4096, 112, 14336, 13824])
def test_outliers_and_range(n):
    x = random_rows(5, n, torch.float16)
    x[:, n // 3] *= 3000
    x[2] = 60000.0 * x[2].sign()
    exact = exact_transform(x, n) * n**-0.5
    y = transformed(x)
    fits = exact.half().isfinite()
    assert torch.equal(y.isfinite(), fits)
    assert in_floors(y[fits], exact[fits]) <= 1.01


@pytest.mark.parametrize("n", [128, 256, 2048, 8192, 112, 768, 14336, 29568, 65536])
def test_signs_and_transpose(n):
    x = random_rows(3, n, torch.float16)
    sign = random_rows(1, n, torch.float16, seed=1)[0].sign()
    for transpose in (False, True):
        y = transformed(x, sign=sign, transpose=transpose)
        assert in_floors(y, exact_transform(x * sign, n, transpose) * n**-0.5) <= 1.01


@pytest.mark.parametrize("n", [64, 128, 256, 1024, 4096, 112, 3072, 6336])
def test_strides(n):
    wide = random_rows(9, 2 * n + 24, torch.float16)
    for x in (wide[:, :n], wide[::2, 8 : 8 + n], wide[1:, 3 : 3 + n], wide[:, : 2 * n : 2], wide[:1, :n]):
        exact = exact_transform(x, n) * n**-0.5
        assert in_floors(transformed(x), exact) <= 1.01
        # In place, and nothing beyond.
        memory = wide.clone()
        inside = memory.as_strided(x.shape, x.stride(), x.storage_offset())
        hadamard_triton.launch(inside, inside, factors=hadamard_factors(n), scale=n**-0.5)
        assert in_floors(inside, exact) <= 1.01
        inside.copy_(x)
        assert torch.equal(memory, wide)


@pytest.mark.parametrize("n", [64, 256, 2048, 112, 768, 4864])
def test_bad_values_stay_in_their_row(n):
    for value in (float("nan"), float("inf")):
        x = random_rows(37, n, torch.float16)
        x[17, n // 2] = value
        y = transformed(x)
        assert not y[17].isfinite().any()
        assert y[:17].isfinite().all() and y[18:].isfinite().all()


def test_no_rows():
    assert transformed(torch.empty(0, 256, dtype=torch.float16)).shape == (0, 256)


@pytest.mark.parametrize("n", [128, 1024, 4096, 8192, 32768, 112, 3072, 13824])
def test_every_schedule(n):
    """Also those that only tuning runs."""
    steps = schedules.steps_of(hadamard_factors(n))
    x = random_rows(rows_for(n), n, torch.float16)
    exact = exact_transform(x, n) * n**-0.5
    for schedule in schedules.candidates(steps.heads, steps.column_bits)[::3]:
        assert in_floors(transformed(x, schedule=schedule), exact) <= 1.01


@pytest.mark.parametrize("n", [8192, 5120, 11008])
def test_programs_that_share_rows(n):
    steps = schedules.steps_of(hadamard_factors(n))
    found = schedules.split_candidates(steps.heads, steps.column_bits)
    assert found and all(each.split > 1 for each in found)
    x = random_rows(3, n, torch.float16)
    exact = exact_transform(x, n, True) * n**-0.5
    for schedule in found[::2]:
        y = transformed(x, schedule=schedule, transpose=True)
        assert in_floors(y, exact) <= 1.01
        # In place a program would read what another has written.
        exact_back = exact_transform(y, n) * n**-0.5
        hadamard_triton.launch(y, y, factors=hadamard_factors(n), scale=n**-0.5, schedule=schedule)
        assert in_floors(y, exact_back) <= 1.01


@pytest.mark.parametrize("n", [4096, 16384, 32768, 3072, 10240, 11008, 13824, 14336])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_shared_memory(n, dtype):
    steps = schedules.steps_of(hadamard_factors(n))
    found = schedules.hopper_candidates(steps.heads, steps.column_bits)
    x = random_rows(rows_for(n), n, dtype)
    sign = random_rows(1, n, dtype, seed=1)[0].sign()
    exact = exact_transform(x * sign, n, True) * n**-0.5
    for schedule in found[:: -(-len(found) // 4)]:
        y = transformed(x, schedule=schedule, sign=sign, transpose=True)
        assert in_floors(y, exact) <= 1.01


def test_hopper_where_measured_faster():
    def chosen(n, is_small):
        steps = schedules.steps_of(hadamard_factors(n))
        found = schedules.choose_hopper(steps.heads, steps.column_bits, is_small)
        return found and (found.rows, found.matrix_rows, found.residents, found.stages, found.parts)

    assert {n: chosen(n, False) for n in (32768, 28672, 11008, 18944, 13824, 8960)} == {
        32768: (1, 128, 1, 3, 2),
        28672: (1, 128, 1, 3, 2),
        11008: (2, 64, 1, 3, 1),
        18944: (2, 64, 1, 2, 1),
        13824: (1, 128, 2, 3, 1),
        8960: (2, 64, 1, 4, 1),
    }
    assert chosen(13824, True) == (1, 128, 1, 4, 1)
    for n in (128, 4096, 16384, 5120, 10240, 14336):
        assert chosen(n, False) is None


# Every kind of size: heads with few and many bits beside them, orders up to the largest, several passes.
ORDERS = (1, 12, 20, 24, 28, 36, 44, 60, 76, 108, 132, 172, 252, 268, 344, 428, 668, 924, 1020)


@pytest.mark.parametrize("order", ORDERS)
def test_schedules_of_all_sizes_can_be_compiled(order):
    """Layouts exist, and programs have at most 16 warps: compilers abort on more."""
    sizes = [order << k for k in range(21) if order << k <= 1 << 20]
    for n in sizes:
        try:
            steps = schedules.steps_of(hadamard_factors(n))
        except UnsupportedError:
            continue
        for is_wide, is_small in product((False, True), repeat=2):
            found = [schedules.choose(steps.heads, steps.column_bits, is_wide, is_small)]
            found.append(schedules.choose_quantized(steps.heads, steps.column_bits, is_wide))
            if not is_wide:
                found += schedules.candidates(steps.heads, steps.column_bits)
                found += schedules.quantized_candidates(steps.heads, steps.column_bits)
            for each in found:
                assert each.num_warps <= 16 and each.rows >= 1
                assert each.matrix << each.column_bits == n // prod(steps.leading)
                plan = make_plan(
                    each.column_bits,
                    each.rows.bit_length() - 1,
                    each.num_warps.bit_length() - 1,
                    "mixed" if each.is_mixed else "rows",
                )
                for layout, bits in ((input_layout(plan, 4), 4), (result_layout(plan), 4)):
                    assert_covers(layout, tile_shape(plan, bits))


def assert_covers(layout, shape):
    """Every element of the shape is somewhere, once."""
    bases = [tuple(basis) for basis in (*layout.reg_bases, *layout.lane_bases, *layout.warp_bases)]
    assert sorted(bases) == sorted(
        [(1 << j, 0) for j in range(shape[0].bit_length() - 1)]
        + [(0, 1 << j) for j in range(shape[1].bit_length() - 1)]
    )
    assert len(layout.lane_bases) == 5


def compile_rows(n: int, dtype: torch.dtype, has_sign: bool = False, capability: int = 90) -> dict:
    steps = schedules.steps_of(hadamard_factors(n))
    is_wide = dtype == torch.float32
    schedule = schedules.choose(steps.heads, steps.column_bits, is_wide, is_small=True)
    has_pdl = capability >= 90
    arguments = dict(
        p_x=dtype,
        p_out=dtype,
        p_h=torch.bfloat16 if is_wide else dtype,
        p_sign=dtype if has_sign else None,
        rows="i32",
        s_x="i32",
        s_out="i32",
        scale="fp32",
        M=schedule.matrix,
        COLUMN_BITS=schedule.column_bits,
        ROWS=schedule.rows,
        MIXED=schedule.is_mixed,
        TERMS_1=3 if is_wide else 1,
        TERMS_2=3 if is_wide else 2,
        UNIT=8,
        UNROLLED=schedule.is_unrolled,
        SPLIT=schedule.split,
        PDL=has_pdl,
    )
    options = {"launch_pdl": True} if has_pdl else {}
    return compile_for(
        capability, hadamard_gluon.rows_kernel, arguments, num_warps=schedule.num_warps, **options
    )


COMPILED = (128, 256, 1024, 2048, 4096, 8192, 16384, 32768, 3072, 11008, 13824, 14336, 18944, 28672)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", COMPILED)
def test_everything_stays_in_registers(tmp_path, n, dtype):
    asm = compile_rows(n, dtype, has_sign=dtype == torch.bfloat16)
    ptx = asm["ptx"]
    assert "mma.sync.aligned.m16n8k16" in ptx
    assert "shfl" not in ptx and ".local" not in ptx
    assert resources(asm["cubin"], tmp_path).stack <= 32
    # Only rows that one warp cannot hold go through shared memory.
    assert ("ld.shared" in ptx or "ldmatrix" in ptx) == (n > 1024)
    assert re.search(r"ld\.global[.\w:]*\.v[24]\.b32", ptx)
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("griddepcontrol.wait")
    assert ptx.index("griddepcontrol.wait") < min(ptx.index("ld.global"), ptx.index("st.global"))


@pytest.mark.parametrize("n", [32768, 11008, 18944, 13824, 28672])
def test_rows_in_shared_memory_compile(tmp_path, n):
    steps = schedules.steps_of(hadamard_factors(n))
    schedule = schedules.choose_hopper(steps.heads, steps.column_bits, is_small=False)
    for dtype, has_sign in ((torch.float16, False), (torch.bfloat16, True)):
        arguments = dict(
            p_x=dtype,
            p_out=dtype,
            p_h=dtype,
            p_sign=dtype if has_sign else None,
            **dict.fromkeys(("rows", "s_x", "s_out"), "i32"),
            scale="fp32",
            M=schedule.matrix,
            C_BITS=schedule.column_bits,
            ROWS=schedule.rows,
            MATRIX_ROWS=schedule.matrix_rows,
            STAGES=schedule.stages,
            PARTS=schedule.parts,
            PDL=True,
        )
        options = {"num_warps": hadamard_triton._HOPPER_WARPS, "launch_pdl": True}
        asm = compile_for(90, hadamard_hopper.hopper_kernel, arguments, **options)
        ptx = asm["ptx"]
        products = schedule.tiles * schedule.parts
        assert len(re.findall(r"wgmma\.mma_async", ptx)) == -(-schedule.matrix // 16) * products
        # Every product but the first is begun before the results of the one before it are worked on.
        order = re.findall(r"wgmma\.mma_async|wgmma\.wait_group|mma\.sync", ptx)
        begin, wait, work = "wgmma.mma_async", "wgmma.wait_group", "mma.sync"
        expected = [begin, *[wait, work, begin] * (products - 2), *[wait, work] * min(2, products)]
        assert [name for name, _ in groupby(order)] == expected
        assert "mma.sync.aligned.m16n8k16" in ptx and "shfl.sync.bfly" not in ptx
        assert resources(asm["cubin"], tmp_path).stack <= 32
        # 16 bytes in, 8 out; nothing but signs is read from shared memory by threads.
        # A size of its own, 16 or 0 bytes, instead of a predicate: the rest is filled with zeros.
        assert re.search(r"cp\.async\.cg[^;]*0x10, %r\d+;", ptx)
        assert "cp.async.ca" not in ptx and not re.search(r"@%p\d+ cp\.async[^;]*, %r\d+;", ptx)
        assert re.search(r"st\.global[.\w:]*\.v2\.b32", ptx)
        assert ("ld.shared" in ptx) == has_sign


@pytest.mark.parametrize("n", [24576, 28672])
def test_longest_fp32_rows_compile(n):
    """The compiler aborts if 32 warps share them."""
    asm = compile_rows(n, torch.float32)
    assert "mma.sync.aligned.m16n8k16" in asm["ptx"] and ".reqntid 512" in asm["ptx"]


@pytest.mark.parametrize("n", [256, 8192, 14336])
def test_fp32_and_ampere_compile(tmp_path, n):
    for capability, dtype in ((90, torch.float32), (80, torch.float32), (80, torch.bfloat16)):
        asm = compile_rows(n, dtype, capability=capability)
        assert "mma.sync.aligned.m16n8k16" in asm["ptx"]
        assert ("griddepcontrol" in asm["ptx"]) == (capability >= 90)
        if capability == 90:
            assert resources(asm["cubin"], tmp_path).stack <= 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_passes_over_columns_compile(tmp_path, dtype):
    for order, has_sign in ((16, True), (44, False), (128, False)):
        arguments = dict(
            p_x=dtype,
            p_out=torch.float32,
            p_h=dtype if dtype != torch.float32 else torch.bfloat16,
            p_sign=dtype if has_sign else None,
            **dict.fromkeys(("inner", "blocks", "s_x", "s_out"), "i32"),
            scale="fp32",
            M=order,
            COLUMNS=hadamard_triton._COLUMNS,
            TERMS=1 if dtype == torch.float16 else 3,
            UNIT=8,
            PDL=True,
        )
        asm = compile_for(
            90, hadamard_gluon.columns_kernel, arguments, num_warps=hadamard_triton._COLUMN_WARPS
        )
        assert "mma.sync.aligned.m16n8k16" in asm["ptx"]
        assert "shared" not in asm["ptx"] and resources(asm["cubin"], tmp_path).stack <= 32
        assert re.search(r"ld\.global[.\w:]*\.v4\.b32", asm["ptx"])
