"""How the Triton kernel of 8-bit attention cuts its work."""

from functools import cache
from typing import NamedTuple

from .launcher import power_of_2

# From here on a head's queries are enough for a tile.
_MANY_QUERIES = 128
_MAX_SPLITS = 64
# Triton 3.6 has no wgmma for fewer.
_MIN_ROWS = 16
# Keys that a program has at least, if the buffer is full.
_MIN_KEYS = 256
# fp32 values that a program has in registers when it adds up those of the splits.
_COMBINED = 8192


class Schedule(NamedTuple):
    """How the work is cut.

    Attributes:
        rows: of a tile, a power of two from 16 on.
        block: keys at a time, 64 or 128.
        num_warps: of a program.
        num_stages: one more than blocks that are on their way.
        splits: programs that share the keys of a tile.
        is_swapped: whether rows are the narrow side of the products: wgmma's other side is 64 at least.
    """

    rows: int
    block: int
    num_warps: int
    num_stages: int
    splits: int
    is_swapped: bool


def pack_of(heads: int, key_heads: int, queries: int) -> int:
    """Heads whose queries share a tile."""
    return heads // key_heads if queries < _MANY_QUERIES else 1


def combined_at_a_time(schedule: Schedule, rows_kept: int, d_block: int) -> tuple[int, int]:
    """How many rows, and of how many splits, a program adds up at a time: all splits if they fit.

    Args:
        schedule: with more than one split.
        rows_kept: of a tile.
        d_block: columns, a power of two.
    """
    values = _COMBINED if schedule.is_swapped else _COMBINED // 2
    splits = power_of_2(schedule.splits)
    rows = max(1, min(power_of_2(rows_kept), values // (d_block * splits)))
    return rows, min(splits, values // (rows * d_block))


@cache
def choose(
    batch: int,
    heads: int,
    key_heads: int,
    queries: int,
    length: int,
    d: int,
    processors: int,
    capability: tuple[int, int],
) -> Schedule:
    """How the work is cut for a device.

    Args:
        batch, heads, key_heads, queries, length, d: sizes B, Hq, Hkv, Sq, L, D of the op.
        processors, capability: of the device.
    """
    pack = pack_of(heads, key_heads, queries)
    # wgmma, and memory for three pairs of blocks of 128 keys; without, there are 99 KiB.
    is_large = (9, 0) <= capability < (12, 0)
    rows = max(_MIN_ROWS, min(power_of_2(pack * queries), 128 if d <= 128 else 64))
    is_swapped = rows <= 32
    block = 128 if is_large and d <= 128 and rows != 64 else 64
    tiles = batch * (heads // pack) * -(-pack * queries // rows)
    blocks = -(-length // block)
    slots = processors * (2 if is_swapped else 1)
    # Starting and storing, in blocks; 64 rows of a split's results are as much as a block of keys and values.
    extra = 1 if is_swapped else 4

    def duration(splits: int) -> float:
        combining = splits * min(rows, pack * queries) / 64 if splits > 1 else 0
        return -(-tiles * splits // slots) * (-(-blocks // splits) + extra) + combining

    splits = min(range(1, min(_MAX_SPLITS, -(-length // _MIN_KEYS)) + 1), key=duration)
    num_stages = 3 if is_large or is_swapped else 2
    return Schedule(rows, block, 4 if is_swapped else 8, num_stages, splits, is_swapped)
