"""Runs the decode attention kernel under Triton's interpreter, started by test_decode_attention.py.

The interpreter's bf16 is wrong without a word, so everything here is fp16.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from decode_attention_cases import MASKS, exact_attention, make_mask
from kernel_helpers import in_floors

from hf_hadacore.kernels import decode_attention_triton
from hf_hadacore.kernels.decode_attention_triton import block_of

F16 = torch.float16
# The result's own rounding, and that of the weights, each of about one floor.
MAX_FLOORS = 1.6
# B, Hq, Hkv, D, L.
SHAPES = [
    (1, 4, 1, 128, 300),
    (2, 8, 2, 64, 257),
    (1, 14, 2, 80, 512),
    (2, 3, 3, 96, 131),
    (1, 16, 1, 112, 65),
    (1, 10, 2, 192, 97),
    (1, 5, 1, 256, 200),
    (3, 2, 1, 128, 1),
]


def hide_unread(tensor: torch.Tensor, mask: torch.Tensor, splits: int) -> torch.Tensor:
    """NaN in the blocks before the first and after the last that a program must read."""
    block = block_of(tensor.shape[3])
    hidden = tensor.clone()
    for i_b, row in enumerate((mask != -torch.inf).flatten(1).expand(tensor.shape[0], -1)):
        blocks = [part.any().item() for part in row.split(block)]
        for i_split in range(splits):
            own = range(i_split, len(blocks), splits)
            live = [i for i in own if blocks[i]]
            for i in own:
                if not live or not live[0] <= i <= live[-1]:
                    hidden[i_b, :, i * block : (i + 1) * block] = torch.nan
    return hidden


def check(shape: tuple[int, int, int, int, int], kind: str, splits: int) -> None:
    batch, heads, kv_heads, d, length = shape
    generator = torch.Generator().manual_seed(length + splits)
    # The queries of a fused projection.
    fused = torch.randn(batch, 1, heads + 2 * kv_heads, d, generator=generator).to(F16)
    q = fused[:, :, :heads].transpose(1, 2)
    keys, values = torch.randn(2, batch, kv_heads, length, d, generator=generator).to(F16)
    mask = make_mask(kind, batch, length, F16, generator)
    scale = 0.15 if splits % 2 else None
    exact = exact_attention(q, keys, values, mask, scale or d**-0.5)
    if mask is not None:
        keys, values = hide_unread(keys, mask, splits), hide_unread(values, mask, splits)
        if splits == 2:
            mask = mask.float()
    arrived = torch.zeros(batch * kv_heads, dtype=torch.int32)
    outs = []
    for _ in range(2):
        out = torch.full((batch, 1, heads, d), torch.nan, dtype=F16)
        decode_attention_triton.launch(q, keys, values, mask, scale, out, arrived, splits, False)
        assert not arrived.any()
        outs.append(out)
    assert torch.equal(*outs), "a repeat differs"
    floors = in_floors(outs[0], exact)
    # One key's value is not rounded at all, and neither is nothing.
    is_exact = kind == "one key" or length == 1 or not exact.any()
    assert torch.equal(outs[0], exact.to(F16)) if is_exact else floors < MAX_FLOORS, (shape, kind, floors)
    if kind == "nothing":
        assert not outs[0][0].any()


if __name__ == "__main__":
    cases = 0
    for i, shape in enumerate(SHAPES):
        blocks = -(-shape[4] // 64)
        for j, kind in enumerate(MASKS):
            # Each shape goes through all numbers of splits that it can have, up to 8.
            check(shape, kind, 1 + (i + j) % min(8, blocks))
            cases += 1
    for splits in range(1, 9):
        check((1, 4, 1, 128, 512), "tail", splits)
        cases += 1
    print(f"interpreted {cases} cases")
