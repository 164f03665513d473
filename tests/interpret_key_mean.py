"""Runs the kernel of key_mean under Triton's interpreter, started by test_key_mean.py.

The interpreter's bf16 is wrong without a word, so there is none here.
"""

import os
import random
from itertools import product

os.environ["TRITON_INTERPRET"] = "1"

import torch
from key_mean_cases import LAYOUTS, in_bounds, random_key, random_tokens

from hf_hadacore.kernels.key_mean_triton import launch, tile_of

SHAPES = [
    (1, 1, 1, 64),
    (2, 3, 100, 128),
    (1, 2, 1500, 64),
    (3, 2, 700, 96),
    (2, 1, 333, 80),
    (2, 2, 129, 256),
    (1, 1, 300, 40),
    (1, 2, 5, 2),
]


def launched(key: torch.Tensor, is_token: torch.Tensor | None, splits: int) -> torch.Tensor:
    batch, heads, _, d = key.shape
    out = torch.full((batch, heads, d), float("nan"))
    arrived = torch.zeros(batch * heads, dtype=torch.int32) if splits > 1 else None
    launch(key, is_token, out, arrived, splits)
    assert arrived is None or not arrived.any()
    return out


def check(draw: random.Random, key: torch.Tensor, splits: int) -> None:
    batch, _, tokens, _ = key.shape
    assert in_bounds(launched(key, None, splits), key, None) <= 1
    kinds = list(product((1, batch), ("whole", "part", "not adjacent")))
    for rows, layout in draw.sample(kinds, 2):
        is_token = random_tokens(rows, tokens)
        # Padding may hold anything.
        padded = key.masked_fill(~is_token[:, None, :, None], float("nan"))
        mask = {
            "whole": is_token,
            "part": torch.cat((~is_token, is_token), 1)[:, tokens:],
            "not adjacent": is_token.mT.contiguous().mT,
        }[layout]
        out = launched(padded, mask, splits)
        assert in_bounds(out, key, is_token) <= 1
        assert not out[~is_token.any(1).expand(batch)].any()


if __name__ == "__main__":
    torch.manual_seed(0)
    draw = random.Random(0)
    for dtype in (torch.float16, torch.float32):
        for case, shape in enumerate(SHAPES):
            tiles = -(-shape[2] // tile_of(shape[3], dtype.itemsize)[0])
            for splits in sorted({1, min(2, tiles), tiles}):
                check(draw, random_key(shape, dtype, LAYOUTS[case % len(LAYOUTS)]), splits)
    # More partial sums than are added up at a time.
    check(draw, random_key((1, 1, 600, 1024), torch.float16, "heads first"), 75)
    print("interpreted key_mean")
