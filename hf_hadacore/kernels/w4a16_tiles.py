"""The order in which the Hopper kernels read int4 weights: tiles that are contiguous in memory.

A tile is 64 rows by 128 inputs, 4 KB, and lies in one piece; the tiles of a row follow each other. Inside a
tile each row has 16 words. Word ``4 t + j`` holds, for ``t`` and ``j`` in 0...3, the eight inputs

    k = 32 j + 16 s + 8 e + 2 t + p    in its nibble    4 p + 2 s + e    (s, e, p in 0...1)

so that four consecutive words are what thread ``t`` of a row needs for the whole tile (one 16-byte load), and
one `lop3` gives an fp16 pair that already is a pair of the matrix instruction's A operand (PTX ISA,
"Matrix fragments for mma.m16n8k16"). The order is a permutation of the nibbles: it is inverted exactly.
"""

import torch

from .. import int4

TILE_ROWS = 64
TILE_INPUTS = 128
TILE_WORDS = TILE_INPUTS // int4.NIBBLES_PER_WORD

# k within a tile as (j, s, e, t, p), and the same bits in the order of words and nibbles.
_BITS = (4, 2, 2, 4, 2)
_TO_TILE = (3, 0, 4, 1, 2)
_FROM_TILE = (1, 3, 4, 0, 2)
# Nibbles are permuted as bytes; this many are in memory at a time.
_BLOCK_NIBBLES = 1 << 26


def is_tileable(out_features: int, in_features: int) -> bool:
    """Whether a weight consists of whole tiles."""
    return out_features % TILE_ROWS == 0 and in_features % TILE_INPUTS == 0 and out_features * in_features > 0


def to_tiles(packed: torch.Tensor) -> torch.Tensor:
    """Reorder a packed weight.

    Args:
        packed: int32 ``[..., N, K/8]`` in the order of `hf_hadacore.int4`; N a multiple of 64, K of 128.

    Returns:
        int32 ``[..., N, K/8]``, contiguous: the same nibbles, tile by tile. Its shape says nothing about
        where a nibble is.
    """
    tiles = torch.empty_like(packed, memory_format=torch.contiguous_format)
    for rows, out in _row_blocks(packed, tiles):
        inner = int4.unpack(rows).view(-1, TILE_ROWS, rows.shape[1] // TILE_WORDS, *_BITS)
        order = (0, 2, 1, *(3 + axis for axis in _TO_TILE))
        out.view(-1).copy_(int4.pack(inner.permute(order).reshape(-1, TILE_INPUTS)).view(-1))
    return tiles


def from_tiles(tiles: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_tiles`.

    Args:
        tiles: int32 ``[..., N, K/8]`` as `to_tiles` made it.

    Returns:
        int32 ``[..., N, K/8]`` in the order of `hf_hadacore.int4`, contiguous.
    """
    packed = torch.empty_like(tiles, memory_format=torch.contiguous_format)
    inner = [_BITS[axis] for axis in _TO_TILE]
    for rows, out in _row_blocks(tiles, packed):
        nibbles = int4.unpack(rows).view(-1, rows.shape[1] // TILE_WORDS, TILE_ROWS, *inner)
        order = (0, 2, 1, *(3 + axis for axis in _FROM_TILE))
        out.copy_(int4.pack(nibbles.permute(order).reshape(rows.shape[0], -1)))
    return packed


def _row_blocks(source: torch.Tensor, target: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Views of matching rows of both, a bounded number of nibbles each."""
    words = source.shape[-1]
    rows = max(1, _BLOCK_NIBBLES // (words * int4.NIBBLES_PER_WORD * TILE_ROWS)) * TILE_ROWS
    source, target = source.reshape(-1, words), target.view(-1, words)
    return list(zip(source.split(rows), target.split(rows), strict=True))
