"""Other int4 kernels that can be imported, each as (weights to rotate, call): for `benchmark_w4a16.py`.

All take a symmetric weight of group size 128, which every format here can hold: w = (q - 8) * scale. A peer
whose package is missing raises ImportError.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from hf_hadacore import int4
from hf_hadacore.kernels.w4a16_tiled import w4a16_tiled
from hf_hadacore.kernels.w4a16_tiles import to_tiles

GROUP = 128


class Problem(NamedTuple):
    """A random weight.

    Attributes:
        packed: int32 ``[N, K/8]``.
        scale: ``[N, K/128]``.
    """

    packed: torch.Tensor
    scale: torch.Tensor


class Peer(NamedTuple):
    """A kernel with its own form of the weight.

    Attributes:
        weights: the tensors that a call reads.
        call: `(weights, x [M, K]) -> [M, N]`.
    """

    weights: tuple[torch.Tensor, ...]
    call: Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]


def ours(problem: Problem, tokens: Sequence[int]) -> Peer:
    tensors = (to_tiles(problem.packed), problem.scale.t().contiguous())
    return Peer(tensors, lambda w, x: w4a16_tiled(x, w[0], w[1].t(), group_size=GROUP))


def ours_with_zeros(problem: Problem, tokens: Sequence[int]) -> Peer:
    """The kernel for asymmetric weights, the default of `HadaCoreConfig`; all zeros are 8."""
    zero = torch.full(problem.scale.t().shape, 8, dtype=torch.uint8, device=problem.scale.device)
    tensors = (to_tiles(problem.packed), problem.scale.t().contiguous(), zero)
    return Peer(tensors, lambda w, x: w4a16_tiled(x, w[0], w[1].t(), w[2].t(), group_size=GROUP))


def cublas(problem: Problem, tokens: Sequence[int]) -> Peer:
    weight = int4.dequantize(*problem, group_size=GROUP)
    return Peer((weight,), lambda w, x: torch.nn.functional.linear(x, w[0]))


def tinygemm(problem: Problem, tokens: Sequence[int]) -> Peer:
    """torch's own int4 kernel (bf16); it computes (q - 8) * scale + zero."""
    # It reads two inputs a byte, the first in the high nibble.
    swapped = problem.packed.view(torch.uint8)
    swapped = swapped << 4 | swapped >> 4
    tiles = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
    scale = problem.scale.t()
    scales_zeros = torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous()
    return Peer((tiles, scales_zeros), lambda w, x: torch.ops.aten._weight_int4pack_mm(x, w[0], GROUP, w[1]))


def gemlite(problem: Problem, tokens: Sequence[int]) -> Peer:
    from gemlite import DType, GemLiteLinear, forward_functional

    n, k = problem.packed.shape[0], 8 * problem.packed.shape[1]
    dtype = DType.FP16 if problem.scale.dtype == torch.float16 else DType.BF16
    layer = GemLiteLinear(
        4, group_size=GROUP, in_features=k, out_features=n, input_dtype=dtype, output_dtype=dtype
    )
    layer.pack(int4.unpack(problem.packed), problem.scale, torch.full_like(problem.scale, 8))
    options = layer.get_meta_args()
    weights = tuple(tensor.data for tensor in layer.get_tensor_args())
    return Peer(weights, lambda w, x: forward_functional(x, None, list(w), options))


def humming(problem: Problem, tokens: Sequence[int]) -> Peer:
    import humming.ops  # noqa: F401  # registers its operators
    from humming.forward import humming_forward
    from humming.kernel.humming import HummingKernel
    from humming.ops.utils import init_humming_launcher
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_and_transform_humming_tensors
    from humming.tune import get_heuristics_config
    from humming.utils.nvrtc import get_nvrtc_library_path

    init_humming_launcher()
    # Its compiler runs in a process of its own, which finds NVRTC's parts only on the library path.
    folders = [os.path.dirname(os.path.realpath(get_nvrtc_library_path()))]
    folders += filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    os.environ["LD_LIBRARY_PATH"] = ":".join(dict.fromkeys(folders))
    n, k = problem.packed.shape[0], 8 * problem.packed.shape[1]
    config, tensors = prepare_and_transform_humming_tensors(
        {"weight": problem.packed, "weight_scale": problem.scale.clone()},
        n,
        k,
        HummingWeightSchema(b_dtype="uint4", weight_scale_group_size=GROUP),
        torch_dtype=problem.scale.dtype,
        device=0,
    )
    tuning = {m: json.dumps(get_heuristics_config(config, shape_m=m, device=0)) for m in tokens}

    def compile_kernel(options: str) -> None:
        HummingKernel.prepare_kernels(config.to_str(), None, options, 0)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_kernel, set(tuning.values())))
    locks = torch.zeros(2048, dtype=torch.int32, device="cuda")

    def call(w: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return humming_forward(
            config,
            inputs=x,
            weight=w[0],
            weight_scale=w[1],
            locks=locks,
            weight_scale_2=tensors.get("weight_scale_2"),
            tuning_config=tuning[x.shape[0]],
        )

    return Peer((tensors["weight"], tensors["weight_scale"]), call)


PEERS: dict[str, tuple[Callable[[Problem, Sequence[int]], Any], torch.dtype]] = {
    # The first of a shape comes out up to a sixth slower than the second, whichever it is.
    "ours_bf16": (ours, torch.bfloat16),
    "ours_fp16": (ours, torch.float16),
    "ours_with_zeros_fp16": (ours_with_zeros, torch.float16),
    "cublas_fp16": (cublas, torch.float16),
    "cublas_bf16": (cublas, torch.bfloat16),
    "tinygemm_bf16": (tinygemm, torch.bfloat16),
    "gemlite_fp16": (gemlite, torch.float16),
    "humming_fp16": (humming, torch.float16),
}
