"""How the Hopper W4A16 kernels are launched, and compiled ahead of that."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import int4
from . import w4a16_schedules as schedules
from .launcher import run
from .w4a16_tiles import TILE_INPUTS

if TYPE_CHECKING:
    from .w4a16_routing import Routing

# Groups of a tile by group size; 0 stands for one group per row.
GROUPS_PER_TILE = {32: 4, 64: 2, 128: 1, -1: 0}
# Arrival counters of one stream: K is not split for products with more tiles of outputs than this.
_COUNTERS = 1 << 16


@cache
def processors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def launch(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    out: torch.Tensor,
    schedule: schedules.Schedule,
) -> None:
    """Run one of the kernels.

    Args:
        x: fp16 or bf16 ``[..., K]``, M rows, any strides, M > 0.
        tiles, scale, zero, input_perm, bias, group_size: as in `w4a16_tiled`.
        out: ``[..., N]`` contiguous, in the dtype of x; every element is written.
        schedule: how the product is cut; a `SkinnySchedule` takes at most its `block_m` tokens.
    """
    k, n = x.shape[-1], out.shape[-1]
    m = out.numel() // n
    k_tiles = k // TILE_INPUTS
    if -(-n // 64) * -(-m // schedule.block_m) > _COUNTERS:
        schedule = schedule._replace(tiles=k_tiles)
    split_k = -(-k_tiles // schedule.tiles)
    if input_perm is not None:
        from .gather_columns import gather_columns

        x = gather_columns(x, input_perm)
    # Most are contiguous, whatever their number of dimensions; views take longer than one would think.
    s_xm = k
    if not x.is_contiguous():
        x = x.reshape(-1, k)
        s_xm = x.stride(0) if m > 1 else k
    # All kernels copy x in aligned pieces of 16 bytes.
    if x.stride(-1) != 1 or s_xm % 16 or x.data_ptr() % 16:
        x, s_xm = x.clone(memory_format=torch.contiguous_format), k
    partials = arrived = out
    if split_k > 1:
        partials = x.new_empty((split_k, m, n), dtype=torch.float32)
        arrived = arrival_counters(x.device)
    tensors = (tiles, scale, zero)
    ends = (bias, out, partials, arrived)
    s_group = scale.stride(1) if scale.shape[1] > 1 else n
    if isinstance(schedule, schedules.SkinnySchedule):
        from .w4a16_skinny import skinny_kernel

        run(
            skinny_kernel,
            (x, *tensors, *ends),
            (m, n, k_tiles, s_xm, s_group),
            (
                schedule.block_m,
                schedule.block_n,
                schedule.tiles,
                split_k,
                schedule.stages,
                GROUPS_PER_TILE[group_size],
            ),
            (-(-n // schedule.block_n), split_k, 1),
            num_warps=schedule.num_warps,
            launch_pdl=True,
        )
        return
    launch_tall(x, s_xm, tensors, ends, m, s_group, group_size, schedule)


def launch_tall(
    x: torch.Tensor,
    s_xm: int,
    weight: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    ends: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor],
    m: int,
    s_group: int,
    group_size: int,
    schedule: schedules.WideSchedule | schedules.PrefillSchedule,
    routing: "Routing | None" = None,
) -> None:
    """Run a kernel for many tokens.

    Args:
        x: ``[..., K]``, aligned to 16 bytes.
        s_xm: its M rows are this many elements apart.
        weight: tiles, scale and zero.
        ends: bias, out, and, where K is split, partial sums and arrival counters.
        m: M.
        s_group: groups of scales are this many elements apart.
        group_size: g.
        schedule: how the product is cut.
        routing: of experts, all of whose weights follow each other. Then x is sorted, and K is not split.
    """
    k, n, groups = x.shape[-1], ends[1].shape[-1], GROUPS_PER_TILE[group_size]
    k_tiles = k // TILE_INPUTS
    is_prefill = isinstance(schedule, schedules.PrefillSchedule)
    n_tiles = -(-n // (256 if is_prefill else 128))
    m_tiles = -(-m // schedule.block_m) if routing is None else len(routing.blocks)
    experts = 1 if routing is None else len(weight[0])
    split_k = -(-k_tiles // schedule.tiles)
    kernel, two_programs = _tall_kernel(is_prefill)
    # STAGES and HALF are the wide kernel's alone.
    stages: tuple[int, ...] = ()
    half: tuple[bool, ...] = ()
    if isinstance(schedule, schedules.WideSchedule):
        stages, half = (schedule.stages,), (schedule.is_half,)
    run(
        kernel,
        (*weight, *((None, None) if routing is None else (routing.blocks, routing.slots)), *ends),
        (m, n, k_tiles, n_tiles, m_tiles, schedule.tiles, s_group, experts),
        (schedule.block_m, split_k, *stages, schedule.slots, groups, *half),
        (n_tiles * m_tiles, split_k, 1),
        num_warps=4,
        descriptors=(_describe(x, m, s_xm, schedule.block_m, 64 if groups == 4 else 128),),
        launch_pdl=True,
        **(two_programs if True in half else {}),
    )


@cache
def _tall_kernel(is_prefill: bool) -> tuple[Any, dict[str, int]]:
    from . import w4a16_prefill, w4a16_wide

    kernel = w4a16_prefill.prefill_kernel if is_prefill else w4a16_wide.wide_kernel
    return kernel, w4a16_wide.TWO_PROGRAMS


def _describe(x: torch.Tensor, m: int, s_xm: int, block_m: int, swizzle: int) -> Any:
    """The TMA descriptor of x, whose m rows are s_xm elements apart."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, [m, x.shape[-1]], [s_xm, 1], [block_m, TILE_INPUTS], _shared_layout(swizzle))


@cache
def _shared_layout(swizzle: int) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle, 16, 2)


class Product(NamedTuple):
    """What decides which kernels a layer's products need.

    Attributes:
        out_features, in_features: N and K.
        group_size: g, or -1.
        dtype: of x, scales and bias: fp16 or bf16.
        has_zero, has_bias: whether there are zeros and a bias.
        has_perm: whether x is read in an order of the layer's own.
    """

    out_features: int
    in_features: int
    group_size: int
    dtype: torch.dtype
    has_zero: bool
    has_bias: bool
    has_perm: bool = False

    def tensors(
        self, *experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Tiles, scale, zero and bias on the meta device.

        Args:
            experts: E, where there are experts.
        """
        n, k, dtype = self.out_features, self.in_features, self.dtype
        groups = int4.num_groups(k, self.group_size)

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((*experts, *shape), dtype=dtype, device="meta")

        return (
            empty(n, k // int4.NIBBLES_PER_WORD, dtype=torch.int32),
            empty(groups, n, dtype=dtype).mT,
            empty(groups, n, dtype=torch.uint8).mT if self.has_zero else None,
            empty(n, dtype=dtype) if self.has_bias else None,
        )


def compile_product(product: Product, tokens: int, device: torch.device) -> None:
    """Compile the kernel of a product, without running anything.

    Args:
        product: what will be called; in tile order.
        tokens: of the call.
        device: a Hopper GPU, the current one.
    """
    n, k, group_size, dtype = product[:4]
    tiles, scale, zero, bias = product.tensors()
    x, out = (torch.empty(tokens, size, dtype=dtype, device="meta") for size in (k, n))
    input_perm = torch.empty(k, dtype=torch.int32, device="meta") if product.has_perm else None
    is_plain = GROUPS_PER_TILE[group_size] < 2
    schedule = schedules.choose(tokens, n, k, "sm90", processors_of(device.index or 0), is_plain)
    launch(x, tiles, scale, zero, input_perm, bias, group_size, out, schedule)


_counters: dict[tuple[torch.device, int], torch.Tensor] = {}
# What `counters_of_graph` has set.
_captured = threading.local()


def arrival_counters(device: torch.device, count: int = _COUNTERS) -> torch.Tensor:
    """Counters of the programs that share an output tile: zero between kernels, one set for each stream.

    Products on different streams must not share them. During a graph capture new ones belong to the graph;
    so do those of a product that needs more than all others share.
    """
    if count > _COUNTERS or device.type == "meta":
        return torch.zeros(count, dtype=torch.int32, device=device)
    counters: torch.Tensor | None = getattr(_captured, "counters", None)
    if counters is not None and counters.device == device:
        return counters
    key = (device, torch._C._cuda_getCurrentRawStream(device.index))
    counters = _counters.get(key)
    if counters is None:
        counters = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        if not torch.cuda.is_current_stream_capturing():
            _counters[key] = counters
    return counters


@contextmanager
def counters_of_graph(counters: torch.Tensor) -> Iterator[None]:
    """Let the products that this thread launches share counters, instead of zeroing new ones for each.

    Args:
        counters: from `new_counters`, made before the capture. They belong to the graph, and must live as
            long: no other graph nor stream may use them.
    """
    _captured.counters = counters
    try:
        yield
    finally:
        del _captured.counters


def new_counters(device: torch.device) -> torch.Tensor:
    """Zeros that `counters_of_graph` takes.

    Args:
        device: a CUDA device, with its index.
    """
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
