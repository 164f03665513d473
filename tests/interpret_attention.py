"""Runs the Triton kernel of 8-bit attention under Triton's interpreter, started by test_attention_triton.py.

The interpreter's own casts from and to 8-bit floats are wrong without a word: torch's take their place.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import attention_exact
import numpy as np
import torch
import triton.language as tl
from attention_cases import E4M3, Problem, make_problem
from attention_exact import exact_attention, is_within_bounds
from triton.runtime import interpreter

from hf_hadacore.kernels import attention_triton
from hf_hadacore.kernels.attention_schedules import Schedule

F16 = torch.float16
# The result's own rounding, and that of P to fp16: both are 2^-12 at most, P's hardly averaged over few keys.
MAX_FLOORS = 1.5
_convert = interpreter._convert_float


def convert(data, source, target, rounding):
    if source == tl.float32 and target == tl.float8e4nv:
        return torch.from_numpy(data.copy()).to(E4M3).view(torch.uint8).numpy()
    if source == tl.float8e4nv and target == tl.float16:
        return torch.from_numpy(data.copy()).view(E4M3).half().numpy().view(np.uint16)
    return _convert(data, source, target, rounding)


def check(problem: Problem, schedule: Schedule, dtype: torch.dtype = F16) -> None:
    exact = exact_attention(attention_exact.Problem(*problem.tensors), **problem.options)
    # fp16 values make P fp16 too, and what is wrong with a single key shows.
    for value in (problem.tensors[2], problem.tensors[2].to(F16)):
        tensors = (*problem.tensors[:2], value, *problem.tensors[3:])
        out = problem.empty(dtype)
        attention_triton.launch(*tensors, out, **problem.options, schedule=schedule)
        about = (schedule, problem.tensors[0].shape, problem.options)
        assert is_within_bounds(out, exact), about
        if value.dtype == F16:
            floor, error = ((y.double() - exact.out).norm() for y in (exact.out.to(dtype), out))
            assert error <= MAX_FLOORS * floor, (error / floor, *about)


def shapes() -> int:
    """Head sizes, tiles and splits."""
    cases = (
        # One token, the heads of a key head together.
        ((2, 8, 2, 1, 300, 128), 16, 128, 1),
        ((2, 8, 2, 1, 1000, 128), 16, 128, 3),
        ((1, 4, 1, 1, 700, 64), 16, 64, 8),
        ((1, 3, 3, 1, 257, 80), 16, 128, 2),
        ((1, 16, 1, 1, 129, 96), 16, 64, 2),
        ((1, 7, 1, 1, 130, 112), 16, 128, 2),
        ((1, 2, 1, 1, 1, 192), 16, 64, 1),
        ((1, 4, 2, 1, 200, 256), 16, 64, 3),
        # Some tokens; rows of a key head in several tiles.
        ((2, 8, 2, 5, 400, 128), 32, 128, 3),
        ((1, 8, 1, 16, 300, 64), 128, 128, 2),
        ((1, 8, 1, 16, 300, 80), 64, 64, 2),
        ((1, 6, 2, 13, 13, 128), 16, 64, 1),
        # Many tokens, or more than there are keys of them before.
        ((1, 2, 1, 200, 200, 64), 128, 128, 1),
        ((1, 2, 1, 130, 333, 128), 64, 64, 2),
        ((2, 2, 2, 129, 257, 96), 128, 128, 1),
        ((1, 1, 1, 150, 150, 192), 64, 64, 1),
        ((1, 1, 1, 150, 150, 256), 128, 64, 1),
    )
    for i, (sizes, rows, block, splits) in enumerate(cases):
        for per_token in (False, True):
            # Both for each head size in turns.
            dtype = (E4M3, torch.int8)[(i + per_token) % 2]
            problem = make_problem(*sizes, dtype=dtype, per_token=per_token, ragged=i % 3 == 0, seed=i)
            check(problem, Schedule(rows, block, 4, 3, splits, rows <= 32))
    return 2 * len(cases)


def options() -> int:
    """Every option with and without every other, for one token, some, or many in turns."""
    tiles = ((1, 260, 16, 2), (5, 200, 16, 2), (130, 200, 128, 1))
    for bits in range(64):
        tokens, keys, rows, splits = tiles[bits % 3]
        has = [bool(bits >> i & 1) for i in range(6)]
        problem = make_problem(
            2,
            2,
            1,
            tokens,
            keys,
            64,
            is_causal=has[0],
            window=100 if has[1] else 0,
            softcap=2.0 if has[2] else 0.0,
            ragged=has[3],
            has_sinks=has[4],
            has_offset=has[5],
            per_token=bits % 5 < 2,
            dtype=(E4M3, torch.int8)[bits % 7 % 2],
            seed=bits,
        )
        check(problem, Schedule(rows, 128, 4, 3, splits, rows <= 32))
    return 64


def replays() -> int:
    """A buffer that fills up, from no key on: bounds that change between launches of the same kernel."""
    problem = make_problem(2, 8, 2, 2, 900, 64, ragged=True, per_token=True)
    tensors, settings = problem
    lengths = (0, 1, 2, 127, 128, 129, 300, 511, 512, 513, 800)
    for length in lengths:
        end = torch.tensor([length, max(0, length - 100)], dtype=torch.int32)
        settings |= dict(key_start=torch.zeros_like(end), key_end=end, query_start=end - 2)
        filled = torch.arange(900) < end[:, None, None]
        cache = [torch.where(filled, x.nan_to_num(1.0), torch.nan) for x in tensors[4:]]
        key = torch.where(filled[..., None], tensors[1].float().nan_to_num(1.0), torch.nan).to(E4M3)
        check(Problem((tensors[0], key, *tensors[2:4], *cache), settings), Schedule(16, 128, 4, 3, 5, True))
    return len(lengths)


def splits() -> int:
    """Into how many parts the keys are split changes fp32 sums alone, as long as P is not rounded."""
    for seed in range(3):
        problem = make_problem(1, 4, 1, 1, 1500, 128, per_token=True, seed=seed)
        outs = []
        for count in (1, 2, 5, 12, 40):
            out = problem.empty(torch.float32)
            schedule = Schedule(16, 128, 4, 3, count, True)
            tensors = (*problem.tensors[:2], problem.tensors[2].float(), *problem.tensors[3:])
            attention_triton.launch(*tensors, out, **problem.options, schedule=schedule)
            outs.append(out)
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-6)
    return 3


def not_a_number() -> int:
    """What is not a number is seen where it is seen, and by nobody else."""
    for place in ("query", "key", "value", "key scale", "value scale"):
        query, key, value, *scales = make_problem(1, 4, 2, 4, 300, 64, per_token=True).tensors
        nan = torch.tensor(0x7F, dtype=torch.uint8)
        if place == "query":
            query.view(torch.uint8)[0, 2, 1, 5] = nan
        elif place == "key":
            key.view(torch.uint8)[0, 1, 7, 3] = nan
        elif place == "value":
            value.view(torch.uint8)[0, 1, 9, 16] = nan
        else:
            scales[1 + (place == "value scale")][0, 1, 20] = torch.nan
        problem = Problem((query, key, value, *scales), make_problem(1, 4, 2, 4, 300, 64).options)
        out = problem.empty(F16)
        schedule = Schedule(16, 128, 4, 3, 2, True)
        attention_triton.launch(*problem.tensors, out, **problem.options, schedule=schedule)
        wrong = out.isnan()
        expected = torch.zeros_like(wrong)
        if place == "query":
            expected[0, 1, 2] = True
        elif place == "value":
            expected[0, :, 2:, 9] = True
        else:
            expected[0, :, 2:] = True
        assert torch.equal(wrong, expected), place
    return 5


def bounds() -> int:
    return replays() + splits() + not_a_number()


if __name__ == "__main__":
    interpreter._convert_float = convert
    count = {"shapes": shapes, "options": options, "bounds": bounds}[sys.argv[1]]()
    print(f"interpreted {count} cases")
