"""The kernel that transforms and quantizes long rows without a GPU: emulated, and compiled."""

import re
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
from check_hadamard_gpu import exact_transform
from gluon_emulator import emulate
from offline import compile_for, resources
from rotate_quantize_exact import SUMS, TWO_TERMS, worst_error

from hf_hadacore.hadamard_matrices import hadamard_factors
from hf_hadacore.kernels import hadamard_quantize, hadamard_triton, rotate_quantize
from hf_hadacore.kernels import hadamard_schedules as schedules
from hf_hadacore.kernels.hadamard_layouts import permutation
from hf_hadacore.kernels.rotate_quantize import SMALLEST_MAXIMUM
from hf_hadacore.kernels.rotate_quantize_checks import LARGEST

POWERS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
OTHERS = (264, 384, 3072, 4864, 5120, 8960, 11008, 13824, 14336, 18944, 27648, 28672)
NAN = float("nan")


def scales_of(maximum, smallest, largest, norm, power_of_2):
    """As the function of `rotate_quantize_tiles`, which the interpreter tests."""
    maximum = maximum.clamp(min=smallest).view(torch.float32)
    scale = maximum * (norm / largest)
    if power_of_2:
        scale = torch.where(scale.isfinite(), scale.log2().ceil().exp2(), scale)
        return scale, norm / scale
    return scale, largest / maximum


def to_8_bits(values, dtype):
    return values.round().nan_to_num(0.0).to(dtype) if dtype == torch.int8 else values


@pytest.fixture
def emulated(monkeypatch):
    """`launch_quantized` on CPU tensors."""
    replacements = dict(
        permute=lambda b_x, source, target: b_x.permute(permutation(source, target)),
        magnitude=lambda b: b.view(torch.int32) & 0x7FFFFFFF,
        scales_of=scales_of,
        to_8_bits=to_8_bits,
    )

    def run(kernel, tensors, sizes, constants, programs, num_warps):
        emulate(kernel, (*tensors, *sizes), (*constants, False), programs, num_warps, **replacements)

    monkeypatch.setattr(hadamard_triton, "_run", run)
    monkeypatch.setattr(hadamard_triton, "_has_kernel", lambda device: True)


def random_rows(rows: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(x: torch.Tensor, dtype: torch.dtype = torch.int8, **options):
    """Values and scales; 8-bit floats are given as fp32 and rounded here."""
    values = torch.full(x.shape, NAN) if dtype != torch.int8 else torch.full(x.shape, 99, dtype=torch.int8)
    scale = torch.full(x.shape[:1], NAN)
    hadamard_triton.launch_quantized(
        x,
        values,
        scale,
        factors=hadamard_factors(x.shape[1]),
        largest=LARGEST[dtype],
        smallest=SMALLEST_MAXIMUM,
        **options,
    )
    return values.to(dtype), scale


@pytest.mark.parametrize("n", POWERS + OTHERS)
def test_against_float64(emulated, n):
    rows = max(3, 5000 // n)
    for number, x_dtype in enumerate((torch.float16, torch.bfloat16, torch.float32)):
        x = random_rows(rows, n, x_dtype)
        x[0] = 0
        x[1, n // 3] *= 500
        sign = random_rows(1, n, x_dtype, seed=1)[0].sign() if number else None
        exact = exact_transform(x if sign is None else x * sign, n) * n**-0.5
        tolerance = TWO_TERMS if x_dtype == torch.float32 else SUMS
        for dtype, power_of_2 in ((torch.int8, number == 1), (torch.float8_e4m3fn, number == 2)):
            values, scale = quantized(x, dtype, sign=sign, power_of_2=power_of_2)
            assert worst_error(values, scale, exact, 1, tolerance, n**-0.5, power_of_2) <= 1, (x_dtype, dtype)


def test_rows_of_any_stride(emulated):
    wide = random_rows(9, 2 * 3072 + 24, torch.float16)
    for x in (wide[::2, 8 : 8 + 3072], wide[1:, 3 : 3 + 3072], wide[:, :6144:2]):
        values, scale = quantized(x)
        assert worst_error(values, scale, exact_transform(x, 3072) * 3072**-0.5, 1, SUMS) <= 1


@pytest.mark.parametrize("n", [1024, 14336])
def test_what_is_not_finite_stays_in_its_row(emulated, n):
    for bad in (NAN, float("inf")):
        x = random_rows(20, n, torch.float16)
        x[7, 5] = bad
        values, scale = quantized(x)
        assert (~(values * scale[:, None]).isfinite()).all(1).nonzero().tolist() == [[7]]
        assert (values * scale[:, None]).isfinite().all(1).sum() == 19


def test_rotate_quantize_takes_it(emulated, monkeypatch):
    """On CUDA, for long rows with a scale per token that are only rotated."""
    monkeypatch.setattr(rotate_quantize, "_knows", lambda x, dtype: True)
    monkeypatch.setattr(rotate_quantize, "on_device", lambda device: nullcontext())
    x = random_rows(10, 1024, torch.bfloat16).view(2, 5, 1024)
    sign = random_rows(1, 1024, seed=1)[0].sign()
    plain = (True, False, False, False, None, None, None, sign)
    expected, expected_scale = rotate_quantize.rotate_quantize_reference(
        x, torch.int8, "token", 0, True, False, sign=sign
    )
    launched = []
    launch = hadamard_triton.launch_quantized
    monkeypatch.setattr(
        hadamard_triton, "launch_quantized", lambda *x, **y: launched.append(1) or launch(*x, **y)
    )
    values, scale = rotate_quantize._cuda(x, torch.int8, "token", 0, *plain)
    assert launched and values.shape == x.shape and scale.shape == (2, 5)
    assert (values.int() - expected.int()).abs().max() <= 1
    torch.testing.assert_close(scale, expected_scale)
    heads = x[None]
    for scale, rotate, transpose, offset in (
        ("block", True, False, None),
        ("token", False, False, None),
        ("token", True, True, None),
        ("token", True, False, torch.zeros(2, 1024)),
    ):
        arguments = (rotate, transpose, False, False, offset, None, None, None)
        rotate_quantize._cuda(heads, torch.int8, scale, 16, *arguments)
    # Two passes over memory, and heads, which have a kernel of their own.
    rotate_quantize._cuda(random_rows(1, 29568), torch.int8, "token", 0, *plain[:-1], None)
    assert not rotate_quantize._has_rows_kernel(random_rows(1, 256), torch.int8)
    assert len(launched) == 1


def compile_quantizing(n: int, values: str, dtype: torch.dtype, capability: int = 90) -> dict:
    steps = schedules.steps_of(hadamard_factors(n))
    is_wide, has_pdl = dtype == torch.float32, capability >= 90
    schedule = schedules.choose_quantized(steps.heads, steps.column_bits, is_wide)
    arguments = dict(
        p_x=dtype,
        p_values=values,
        p_scale=torch.float32,
        p_h=torch.bfloat16 if is_wide else dtype,
        p_sign=None,
        rows="i32",
        s_x="i32",
        M=schedule.matrix,
        COLUMN_BITS=schedule.column_bits,
        ROWS=schedule.rows,
        MIXED=schedule.is_mixed,
        TERMS_1=2 if is_wide else 1,
        UNIT=8,
        LARGEST=127.0,
        SMALLEST=1,
        POWER_OF_2=is_wide,
        PDL=has_pdl,
    )
    options = {"launch_pdl": True} if has_pdl else {}
    kernel = hadamard_quantize.quantize_rows_kernel
    return compile_for(capability, kernel, arguments, num_warps=schedule.num_warps, **options)


@pytest.mark.parametrize("n", [384, 1024, 4096, 8192, 32768, 5120, 11008, 14336, 18944, 28672])
def test_results_stay_in_registers(tmp_path, n):
    for values, dtype in (("*fp8e4nv:16", torch.bfloat16), ("*i8:16", torch.float16)):
        asm = compile_quantizing(n, values, dtype)
        ptx = asm["ptx"]
        assert resources(asm["cubin"], tmp_path).stack <= 32
        assert re.search(r"ld\.global[.\w:]*\.v4\.b32", ptx) and "mma.sync.aligned.m16n8k16" in ptx
        assert ("cvt.rn.satfinite.e4m3x2" in ptx) == (dtype == torch.bfloat16)
        assert ptx.index("griddepcontrol.wait") < min(ptx.index("ld.global"), ptx.index("st.global"))


def test_fp32_and_ada_compile(tmp_path):
    for n, dtype, capability in (
        (8192, torch.float32, 90),
        (14336, torch.float32, 90),
        (4096, torch.bfloat16, 89),
    ):
        asm = compile_quantizing(n, "*fp8e4nv:16", dtype, capability)
        assert resources(asm["cubin"], tmp_path).stack <= 32
