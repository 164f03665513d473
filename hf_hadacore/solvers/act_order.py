"""Act-order: the order in which GPTQ quantizes the channels of a layer's input.

A channel's error can only be made up for by channels that come after it, so the ones that matter most go
first (https://github.com/IST-DASLab/gptq, ``--act-order``).
"""

import torch

from ..errors import QuantizationError


def falling_diagonal(hessian: torch.Tensor, *, within: int | None = None, repeats: int = 1) -> torch.Tensor:
    """Channels by falling Hessian diagonal; equal ones keep their order.

    Args:
        hessian: fp32 ``[K, K]``.
        within: d: channels move only inside blocks of d (the heads that an output projection reads).
        repeats: that many consecutive blocks share one permutation (the query heads of one KV head: what is
            baked into the rows of its V projection moves all of them); their diagonals are summed.

    Returns:
        int64 ``[K]``: ``order[i]`` is the channel that comes i-th.

    Raises:
        QuantizationError: K is not a multiple of ``within * repeats``.
    """
    diagonal = hessian.diagonal()
    k = len(diagonal)
    block = k if within is None else within
    if k % (block * repeats):
        raise QuantizationError(f"{k} channels are not blocks of {block}, {repeats} of them together")
    shared = diagonal.reshape(-1, repeats, block).sum(dim=1)
    order = shared.argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(0, k, block, device=order.device)
    return (order.repeat_interleave(repeats, dim=0) + starts[:, None]).flatten()
