"""Products of tokens with the experts chosen for them, int4 weights in tile order: the op `w4a16_experts`.

On Hopper one launch of a Gluon kernel takes any number of experts, and reads on the device which ones:
nothing waits for the CPU, so decoding steps can be CUDA graphs. For few slots that is
`w4a16_skinny.experts_kernel`, where those of one expert find each other. Many are sorted by expert
(`w4a16_routing`), and the kernels for many tokens go through blocks of them. Elsewhere the reference goes
through the experts one by one.
"""

from collections.abc import Iterator

import torch

from .. import int4
from ..errors import FormatError, UnsupportedError
from . import w4a16_schedules as schedules
from .launcher import goes_straight, on_device, power_of_2, run
from .w4a16_launch import GROUPS_PER_TILE, Product, arrival_counters, launch_tall, processors_of
from .w4a16_tiled import check_arguments as check_product
from .w4a16_tiled import prefers_tiles, w4a16_tiled_reference
from .w4a16_tiles import TILE_INPUTS

# Up to this many slots, and this many for each expert, they find each other in the kernel. Sorting costs some
# microseconds, but then a weight is read once for more than 8 tokens, and no program searches all slots.
_MAX_SEARCHED_SLOTS = 256
_MAX_SEARCHED_SLOTS_PER_EXPERT = 8

torch.library.define(
    "hf_hadacore::w4a16_experts",
    "(Tensor x, Tensor tiles, Tensor scale, Tensor? zero, Tensor? bias, Tensor expert_index, int group_size)"
    " -> Tensor",
)


def w4a16_experts(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    expert_index: torch.Tensor,
    *,
    group_size: int,
) -> torch.Tensor:
    """y[s] = x[s // (S/R)] W[expert_index[s]]^T + bias[expert_index[s]] for S slots, a slot being one choice.

    Not differentiable. On CUDA fp32 partial products are scaled and the result is rounded once; the same
    input gives the same bits.

    Args:
        x: fp16 or bf16 ``[R, K]``; each row is for S/R slots.
        tiles: int32 ``[E, N, K/8]`` as `w4a16_tiles.to_tiles` orders it; N a multiple of 64, K of 128.
        scale: fp16, bf16 or fp32 ``[E, N, ceil(K/g)]``, the transpose of a contiguous ``[E, ceil(K/g), N]``.
        zero: uint8 ``[E, N, ceil(K/g)]``, strided like `scale`; None means z = 8.
        bias: ``[E, N]``, contiguous.
        expert_index: int32 or int64 ``[S]``, contiguous. Slots with an index below 0 or from E on (expert
            parallelism's sentinels) give zeros.
        group_size: g: 32, 64, 128, or -1 for one group per row.

    Returns:
        ``[S, N]`` in the dtype of x.

    Raises:
        FormatError: a shape, dtype or stride does not fit.
        UnsupportedError: in the backward pass.
    """
    op = _cuda if goes_straight(x) else torch.ops.hf_hadacore.w4a16_experts
    return op(x, tiles, scale, zero, bias, expert_index, group_size)


def check_arguments(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    expert_index: torch.Tensor,
    group_size: int,
) -> None:
    """Check shapes, dtypes and strides.

    Raises:
        FormatError: naming the tensor, what was found and what is expected.
    """
    if tiles.dim() != 3 or not tiles.shape[0]:
        raise FormatError(f"tiles: expected int32 [E, N, K/8], found {tiles.dtype} {tuple(tiles.shape)}")
    experts, n, _ = tiles.shape
    if bias is not None and (tuple(bias.shape) != (experts, n) or not bias.is_contiguous()):
        raise FormatError(
            f"bias: expected contiguous ({experts}, {n}), found {tuple(bias.shape)} with strides "
            f"{bias.stride()}"
        )
    is_vector = expert_index.dim() == 1 and expert_index.is_contiguous()
    if not is_vector or expert_index.dtype not in (torch.int32, torch.int64):
        raise FormatError(
            f"expert_index: expected contiguous int32 or int64 [S], found {expert_index.dtype} "
            f"{tuple(expert_index.shape)} with strides {expert_index.stride()}"
        )
    if x.dim() != 2 or (len(expert_index) % len(x) if len(x) else len(expert_index)):
        raise FormatError(
            f"x: expected [R, K] with R dividing the {len(expert_index)} slots, found {tuple(x.shape)}"
        )
    for name, values in (("scale", scale), ("zero", zero)):
        if values is not None and (values.dim() != 3 or not values.mT.is_contiguous()):
            raise FormatError(
                f"{name}: expected the transpose of a contiguous [E, ceil(K/g), N], found "
                f"{tuple(values.shape)} with strides {values.stride()}"
            )
    check_product(x, tiles[0], scale[0], None if zero is None else zero[0], None, None, group_size)


@torch.library.register_fake("hf_hadacore::w4a16_experts")
def _fake(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    expert_index: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty((expert_index.shape[0], tiles.shape[1]))


def w4a16_experts_reference(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    expert_index: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """The specification: for each expert what `w4a16_tiled_reference` gives for its slots."""
    check_arguments(x, tiles, scale, zero, bias, expert_index, group_size)
    out = x.new_zeros(len(expert_index), tiles.shape[1])
    for expert, slots in slots_by_expert(expert_index, len(tiles)):
        rows = slots // (len(expert_index) // len(x))
        weight = (tiles[expert], scale[expert], None if zero is None else zero[expert])
        bias_of_one = None if bias is None else bias[expert]
        out[slots] = w4a16_tiled_reference(x[rows], *weight, None, bias_of_one, group_size)
    return out


def slots_by_expert(expert_index: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that was chosen, in ascending order, with the slots that chose it.

    Waits for the device. Indices that are not 0...experts - 1 are left out.

    Args:
        expert_index: integer ``[S]``.
        experts: E.
    """
    for expert in torch.unique(expert_index).tolist():
        if 0 <= expert < experts:
            yield expert, torch.where(expert_index == expert)[0]


torch.library.impl("hf_hadacore::w4a16_experts", "default", w4a16_experts_reference)


def _cuda(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    expert_index: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    experts, n, words = tiles.shape
    k = words * int4.NIBBLES_PER_WORD
    slots = len(expert_index)
    if x.dtype not in (torch.float16, torch.bfloat16) or not prefers_tiles(x.device, n, k, group_size):
        return w4a16_experts_reference(x, tiles, scale, zero, bias, expert_index, group_size)
    check_arguments(x, tiles, scale, zero, bias, expert_index, group_size)
    out = torch.empty((slots, n), dtype=x.dtype, device=x.device)
    if slots:
        with on_device(x.device):
            schedule = choose_schedule(slots, experts, n, k, processors_of(x.device.index or 0), group_size)
            launch(x, tiles, scale, zero, bias, expert_index, group_size, out, schedule)
    return out


torch.library.impl("hf_hadacore::w4a16_experts", "cuda", _cuda)


def choose_schedule(
    slots: int, experts: int, n: int, k: int, processors: int, group_size: int
) -> schedules.Schedule:
    """How the products are cut.

    Args:
        slots, experts, n, k: S, E, N and K.
        processors: of the GPU.
        group_size: g.
    """
    if slots > min(_MAX_SEARCHED_SLOTS, _MAX_SEARCHED_SLOTS_PER_EXPERT * experts):
        # One schedule up to each power of two: a new number of tokens seldom needs a new kernel.
        return schedules.choose_grouped(
            power_of_2(slots), experts, n, k // TILE_INPUTS, GROUPS_PER_TILE[group_size] < 2
        )
    # As if all weights that may be read were one tall matrix.
    return schedules.choose_skinny(8, n * min(slots, experts), k // TILE_INPUTS, processors)


def launch(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    expert_index: torch.Tensor,
    group_size: int,
    out: torch.Tensor,
    schedule: schedules.Schedule,
) -> None:
    """Run the kernels.

    Args:
        x, tiles, scale, zero, bias, expert_index, group_size: as in `w4a16_experts`, S > 0.
        out: ``[S, N]`` contiguous, in the dtype of x; every element is written.
        schedule: how the products are cut. With a `SkinnySchedule` S is at most 65535, and slots share a read
            of their expert's weights up to 256 of them.
    """
    if not isinstance(schedule, schedules.SkinnySchedule):
        from .w4a16_routing import sort_slots

        (experts, n, _), slots_per_row = tiles.shape, len(out) // len(x)
        routing = sort_slots(expert_index, experts, slots_per_row, schedule.block_m)
        x = x.index_select(0, routing.rows)
        ends = (bias, out, out, out)
        launch_tall(x, x.shape[1], (tiles, scale, zero), ends, len(out), n, group_size, schedule, routing)
        return
    (rows, k), (slots, n) = x.shape, out.shape
    k_tiles = k // TILE_INPUTS
    split_k = -(-k_tiles // schedule.tiles)
    # x is copied in aligned pieces of 16 bytes.
    s_xm = x.stride(0) if rows > 1 else k
    if x.stride(1) != 1 or s_xm % 16 or x.data_ptr() % 16:
        x, s_xm = x.clone(memory_format=torch.contiguous_format), k
    n_tiles = -(-n // schedule.block_n)
    partials = arrived = out
    if split_k > 1:
        partials = torch.empty((split_k, slots, n), dtype=torch.float32, device=x.device)
        arrived = arrival_counters(x.device, n_tiles * slots)
    # One token's experts all differ. The search is compiled for a few numbers of slots.
    search = 0 if rows == 1 or slots > _MAX_SEARCHED_SLOTS else max(32, 1 << (slots - 1).bit_length())
    tensors = (x, tiles, scale, zero, expert_index, bias, out, partials, arrived)
    sizes = (slots, len(tiles), slots // rows, n, k_tiles, s_xm, n * scale.shape[2])
    constants = (schedule.block_m, schedule.block_n, schedule.tiles, split_k, schedule.stages)
    from .w4a16_skinny import experts_kernel

    run(
        experts_kernel,
        tensors,
        sizes,
        (*constants, GROUPS_PER_TILE[group_size], search),
        (n_tiles, split_k, slots),
        num_warps=schedule.num_warps,
        launch_pdl=True,
    )


def compile_products(product: Product, experts: int, rows: int, slots: int, device: torch.device) -> None:
    """Compile the kernels of products with experts, without running anything.

    Args:
        product: with one expert.
        experts, rows, slots: E, R and S.
        device: a Hopper GPU, the current one.
    """
    n, k, group_size, dtype = product[:4]
    tiles, scale, zero, bias = product.tensors(experts)
    x, out = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((rows, k), (slots, n)))
    index = torch.empty(slots, dtype=torch.int64, device="meta")
    schedule = choose_schedule(slots, experts, n, k, processors_of(device.index or 0), group_size)
    launch(x, tiles, scale, zero, bias, index, group_size, out, schedule)


def _setup_context(ctx, inputs, output):
    pass


def _backward(ctx, grad):
    raise UnsupportedError("w4a16_experts has no gradient; call w4a16_tiled for each expert instead")


torch.library.register_autograd("hf_hadacore::w4a16_experts", _backward, setup_context=_setup_context)
