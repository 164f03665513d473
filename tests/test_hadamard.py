"""The Hadamard transform on the CPU: against float64, what it refuses, and that torch can trace it."""

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from hf_hadacore import hadamard_transform
from hf_hadacore.errors import FormatError, UnsupportedError
from hf_hadacore.hadamard_matrices import hadamard_factors, hadamard_matrix
from hf_hadacore.kernels.hadamard_products import transform_by_products

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
POWERS = [2**k for k in range(17)] + [2**20]
MIXED_SIZES = [80, 96, 112, 192, 576, 3072, 4864, 5120, 6144, 8960, 10240, 11008, 13824, 14336]
LARGE_MIXED_SIZES = [18944, 27648, 28672, 29568]
ops = torch.ops.hf_hadacore


def random(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def signs(n, dtype=torch.float32):
    return random(n, seed=9).sign().to(dtype)


def dense(x, sign=None, block_size=None, transpose=False, scale=None):
    """The definition, in float64."""
    size = block_size or x.shape[-1]
    h = hadamard_matrix(size).double() * (size**-0.5 if scale is None else scale)
    wide = x.double()
    if sign is not None and not transpose:
        wide = wide * sign.double()
    y = (wide.unflatten(-1, (-1, size)) @ (h if transpose else h.T)).flatten(-2)
    return y * sign.double() if sign is not None and transpose else y


def rows_of_matrix(n, indices):
    """Some rows of the matrix of order n, without the others."""
    rows = torch.ones(len(indices), 1, dtype=torch.float64)
    inner = n
    for factor in hadamard_factors(n):
        inner //= factor
        if factor > 1024:  # Sylvester's: the parity of the bits that both indices have
            both = indices[:, None] & torch.arange(factor)
            for shift in (16, 8, 4, 2, 1):
                both = both ^ both >> shift
            part = 1.0 - 2.0 * (both & 1).double()
        else:
            part = hadamard_matrix(factor)[indices // inner % factor].double()
        rows = (rows[:, :, None] * part[:, None]).flatten(1)
    return rows


def in_floors(y, exact):
    """Relative L2 error in multiples of what one rounding of the exact result costs."""
    floor = (exact.to(y.dtype).double() - exact).norm()
    return ((y.double() - exact).norm() / floor).item()


@pytest.mark.parametrize("outliers", [False, True], ids=["normal", "outliers"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [n for n in POWERS if n > 1] + MIXED_SIZES + LARGE_MIXED_SIZES)
def test_one_rounding(n, dtype, outliers):
    x = random((3, n))
    if outliers:
        x[:, :: max(1, n // 7)] *= 300
    x = x.to(dtype)
    y = hadamard_transform(x, 0.75 * n**-0.5)
    indices = torch.randperm(n, generator=torch.Generator().manual_seed(1))[: min(200, max(16, 2**20 // n))]
    exact = 0.75 * n**-0.5 * (x.double() @ rows_of_matrix(n, indices).T)
    assert in_floors(y[:, indices], exact) <= 1.05


def test_rows_of_matrix():
    for n in (8960, 4096):
        indices = torch.tensor([0, 1, 77, n - 1])
        assert torch.equal(rows_of_matrix(n, indices), hadamard_matrix(n)[indices].double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_size_one_scales(dtype):
    x = random((5, 1), dtype)
    assert torch.equal(hadamard_transform(x), x)
    assert torch.equal(hadamard_transform(x, -2.0), -2 * x)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("block_size", [None, 12, 96])
@pytest.mark.parametrize("sign_dtype", [None, torch.int8, torch.float32])
@pytest.mark.parametrize("inplace", [False, True])
def test_options(inplace, sign_dtype, block_size, transpose):
    x = random((7, 96), torch.float16)
    sign = None if sign_dtype is None else signs(96, sign_dtype)
    options = dict(sign=sign, block_size=block_size, transpose=transpose)
    original = x.clone()
    y = hadamard_transform(x, 0.25, inplace=inplace, **options)
    assert (y is x) == inplace and (inplace or torch.equal(x, original))
    assert in_floors(y, dense(original, scale=0.25, **options)) <= 1.05


@pytest.mark.parametrize("options", [{}, {"sign": signs(560)}, {"block_size": 80}])
def test_transpose_is_the_inverse(options):
    x = random((4, 560))
    y = hadamard_transform(hadamard_transform(x, **options), transpose=True, **options)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-6)


LAYOUTS = {
    "vector": lambda x: x[0, 0],
    "offset": lambda x: x[..., 3:83],
    "steps": lambda x: x[..., 1::2][..., :80],
    "odd rows": lambda x: x[:, 1::2, :80],
    "permuted": lambda x: x[..., :80].permute(1, 0, 2),
    "transposed": lambda x: x[:, :80, :].transpose(1, 2),
    "expanded": lambda x: x[:1, :, :80].expand(3, -1, -1),
    "same element": lambda x: x[:, :, :1].expand(-1, -1, 80),
    "no rows": lambda x: x[:0],
    "no rows inside": lambda x: x[:, :0].transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"block_size": 8}, {"sign": True}, {"sign": True, "block_size": 8}])
def test_any_layout(layout, options):
    x = LAYOUTS[layout](random((4, 81, 160), torch.bfloat16))
    n = x.shape[-1]
    options = options | {"sign": signs(n)} if "sign" in options else options
    y = hadamard_transform(x, **options)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    assert x.numel() == 0 or in_floors(y, dense(x, **options)) <= 1.05


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("expanded", "same element")])
@pytest.mark.parametrize("options", [{}, {"sign": True, "block_size": 8, "transpose": True}])
def test_in_place_writes_its_view_alone(layout, options):
    base = random((4, 81, 160), torch.bfloat16)
    before, x = base.clone(), LAYOUTS[layout](base)
    options = options | {"sign": signs(x.shape[-1])} if "sign" in options else options
    version = base._version
    expected = hadamard_transform(x, **options)
    assert hadamard_transform(x, inplace=True, **options) is x
    assert torch.equal(x, expected)
    LAYOUTS[layout](before).copy_(expected)
    assert torch.equal(base, before)
    assert x.numel() == 0 or base._version > version


def test_rows_beyond_one_chunk():
    x = random((1001, 576), torch.float16)
    y = hadamard_transform(x)
    assert in_floors(y, dense(x)) <= 1.05
    # A chunk's rows do not depend on where it begins.
    assert torch.equal(hadamard_transform(x[455:458]), y[455:458])


class Operators(TorchDispatchMode):
    """Remembers the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen.add(function)
        return function(*arguments, **(options or {}))


def test_matrices_move_to_a_device_once():
    """A CUDA graph cannot record that copy; the meta device stands in for the GPU."""
    x = torch.empty(3, 5120, device="meta")
    options = dict(factors=hadamard_factors(5120), scale=0.375, sign=None, transpose=False)
    to_device = torch.ops.aten._to_copy.default
    with Operators() as first:
        transform_by_products(x, x, **options)
    with Operators() as second:
        transform_by_products(x, x, **options)
    assert to_device in first.seen and to_device not in second.seen
    assert torch.ops.aten.mm.out in second.seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_overflow_inside(dtype):
    largest = torch.finfo(dtype).max
    x = torch.full((2, 4096), largest, dtype=dtype)
    x[1, 1::2] *= -1
    y = hadamard_transform(x, 1 / 4096)
    expected = torch.zeros_like(x)
    expected[0, 0] = expected[1, 1] = largest
    assert torch.equal(y, expected)


@pytest.mark.parametrize("n", [64, 4096, 14336])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_row(bad, n):
    x = random((5, n), torch.float16)
    clean = hadamard_transform(x)
    x[2, n // 3] = bad
    y = hadamard_transform(x)
    assert not y[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], clean[others])


def test_settings_for_other_products_do_not_matter():
    x = random((9, 512), torch.float16)
    y = hadamard_transform(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hadamard_transform(x), y)
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        assert in_floors(hadamard_transform(x), dense(x)) <= 1.05
    finally:
        products.fp32_precision = before
    with torch.inference_mode():
        assert torch.equal(hadamard_transform(x), y)
        assert torch.equal(hadamard_transform(x + 0, inplace=True), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"transpose": True}, {"block_size": 28, "sign": signs(112)}])
def test_gradient(options, dtype):
    x, grad = random((3, 112), dtype).requires_grad_(), random((3, 112), dtype, seed=1)
    hadamard_transform(x, 0.3, **options).backward(grad)
    transposed = options | {"transpose": not options.get("transpose", False)}
    assert in_floors(x.grad, dense(grad, scale=0.3, **transposed)) <= 1.05


def test_gradient_of_the_gradient():
    x, v, w = (random((3, 80), seed=seed) for seed in range(3))
    x.requires_grad_(), v.requires_grad_()
    (first,) = torch.autograd.grad(hadamard_transform(x).square().sum() / 2, x, create_graph=True)
    torch.testing.assert_close(first, x)  # H^T H = I
    (second,) = torch.autograd.grad((first * w).sum(), x)
    torch.testing.assert_close(second, w)


def test_in_place_under_autograd():
    leaf = random((2, 3, 20)).requires_grad_()
    with pytest.raises(RuntimeError, match=r"leaf Variable.*in-place"):
        hadamard_transform(leaf, inplace=True)
    with torch.no_grad():
        expected = hadamard_transform(leaf.detach())
        assert torch.equal(hadamard_transform(leaf.clone(), inplace=True), expected)

    weights, sign = random((2, 3, 20), seed=1), signs(20)
    x = leaf * 1
    part = x[1]
    assert hadamard_transform(part, inplace=True, sign=sign) is part
    (x * weights).sum().backward()
    expected = torch.stack([weights[0], hadamard_transform(weights[1], sign=sign, transpose=True)])
    assert torch.equal(leaf.grad, expected)

    saved = leaf.exp()
    y = saved.sum()
    hadamard_transform(saved, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arguments", [(None, None, None, False), (0.5, signs(96), 32, True)])
def test_opcheck(arguments, dtype):
    opcheck(ops.hadamard_transform, (random((2, 3, 96), dtype).requires_grad_(), *arguments))
    opcheck(ops.hadamard_transform, (random((3, 96, 5), dtype).transpose(1, 2), *arguments))
    opcheck(ops.hadamard_transform_, (random((2, 3, 96), dtype), *arguments))
    opcheck(ops.hadamard_transform_, (random((3, 96, 5), dtype).transpose(1, 2), *arguments))


def test_compiles_in_one_graph():
    def rotate(x):
        y = x * 2
        hadamard_transform(y, inplace=True)
        return y + hadamard_transform(x.transpose(0, 1).contiguous().transpose(0, 1))

    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    x = random((5, 64)).requires_grad_()
    torch.testing.assert_close(compiled(x), rotate(x))
    (grad,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(rotate(x).square().sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("x", "options", "error", "parts"),
    [
        (torch.zeros(2, 6), {}, UnsupportedError, ["order 6", "4 and 8", "block_size=2"]),
        (torch.zeros(2, 0), {}, UnsupportedError, ["at least 1", "found 0"]),
        (torch.zeros(2, 24), {"block_size": 6}, UnsupportedError, ["order 6"]),
        (torch.zeros(2, 24), {"block_size": 0}, UnsupportedError, ["found 0"]),
        (torch.zeros(2, 24), {"block_size": 16}, FormatError, ["block_size", "24", "16"]),
        (torch.zeros(()), {}, FormatError, ["[..., n]"]),
        (torch.zeros(2, 4, dtype=torch.int32), {}, FormatError, ["fp16", "int32"]),
        (torch.zeros(2, 4, dtype=torch.float64), {}, FormatError, ["fp16", "float64"]),
        (torch.zeros(2, 4), {"sign": torch.ones(2)}, FormatError, ["sign", "[4]", "(2,)"]),
        (torch.zeros(2, 4), {"sign": torch.ones(4, device="meta")}, FormatError, ["cpu", "meta"]),
    ],
)
def test_bad_input(x, options, error, parts, inplace):
    with pytest.raises(error) as raised:
        hadamard_transform(x, inplace=inplace, **options)
    assert all(part in str(raised.value) for part in parts), str(raised.value)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 8).expand(3, 8),
        torch.zeros(3, 1).expand(3, 8),
        torch.zeros(64).as_strided((4, 8), (4, 1)),
    ],
)
def test_overlap_in_place(x):
    with pytest.raises(FormatError, match=r"overlap.*inplace=False"):
        hadamard_transform(x, inplace=True)
