"""How the work of rotate_quantize's kernel is cut: what was fastest on an H100.

Measured by ``scripts/benchmark_rotate_quantize.py --tune``, from bf16, at 128 and 256 elements a head.
"""

from typing import NamedTuple

import torch

# Bytes of shared memory that one program may have on Hopper.
HOPPER_MEMORY = 227 * 1024


class Schedule(NamedTuple):
    """How the work is cut.

    Attributes:
        tile: rows of a tile, at least the tokens that share a scale.
        num_warps: of a program.
        stages: 1 gives every tile its own program. With more, programs go through several tiles, of which so
            many are on their way from memory or worked on.
        programs: of a processor, if stages is more than 1.
        heads: of a tile at most, where they share cos and sin.
        registers: of a thread at most, if that lets one more program into a processor.
    """

    tile: int
    num_warps: int
    stages: int = 1
    programs: int = 0
    heads: int = 4
    registers: int | None = None


def choose(
    d: int, dtype: torch.dtype, *, group: int, rotate: bool, angles: int, has_large_memory: bool
) -> Schedule:
    """The schedule for heads of d elements.

    Args:
        d: elements of a head.
        dtype: of x.
        group: tokens that share a scale; 0 for all of a head.
        rotate: whether there are products.
        angles: elements of a token's cos, which are d, d/2 or, without RoPE, 0.
        has_large_memory: whether a program may have `HOPPER_MEMORY`.
    """
    if not rotate:
        return Schedule(max(64, group), 8)
    # More than one stage has to fit into shared memory.
    is_staged = has_large_memory and dtype != torch.float32 and group <= 64
    is_power_of_2 = d & (d - 1) == 0
    if d > 128:
        if is_staged and (is_power_of_2 or not angles):
            return Schedule(64, 8, 2, 1 if angles else 2)
        return Schedule(max(64, group), 8)
    if angles and is_staged:
        if angles < d and is_power_of_2 and dtype == torch.bfloat16:
            return Schedule(64, 4, 2, 4, registers=128)
        return Schedule(64, 4, 2, 3)
    # At 64 elements a head this is as many bytes as at 128.
    is_small = d <= 64 and dtype != torch.float32 and not angles
    return Schedule(max(128 if is_small else 64, group), 4)
