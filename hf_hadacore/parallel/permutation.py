"""Reordered channels that no rank has to gather: the TP-aware permutation of arXiv:2402.04925.

GPTQ with act-order quantizes the columns of a weight W ``[N, K]`` in an order P of its own, and groups of
neighbours in that order share a scale. What is stored is ``W[:, P]``, and as a product sums over its columns
in any order,

    W x = W[:, P] x[P].

Who computes ``x[P]``? In a gated MLP ``W2 (act(G x) * (U x))`` under tensor parallelism every rank holds some
rows of G and U and the same columns of W2. ``h[P2]`` of h = act(G x) * (U x) takes channels from every rank:
the naive way gathers h, permutes it and splits it again. But act and ``*`` work channel by channel, so

    h[P2] = act(G[P2] x) * (U[P2] x):

with its *rows* (weights, scales, zeros, biases) in the order P2, the producer's outputs come out permuted.
Nothing is left to do at run time, and rank r's rows of G and U go with its columns of W2 for any number of
ranks that cuts no group. The same holds for every expert of a mixture.

The order P1 in which G and U read x is one for both, because they see the same inputs and so have the same
Hessian; so is that of q, k and v. Their x is the same on every rank: the kernel reads ``x[P1]`` in place,
with P1 stored beside the weight as `input_perm`.

The inputs of o_proj are the heads' outputs, sums of rows of v with weights that are one for a whole head: the
channels of v may be permuted within a head, and all query heads of a KV head get that head's order,

    P(h d + i) = h d + p_j(i)  for query head h of KV head j,  v's rows  j d + p_j(i).

Heads stay where they are, on their rank and with their q and k.

Whether a module computes what this needs is found by running it: see `permutation_search`.
"""

from typing import NamedTuple, TypeVar

import torch

from ..errors import FormatError
from ..int4 import Int4Weight

_Rows = TypeVar("_Rows", torch.Tensor, Int4Weight)


class PermutationGroup(NamedTuple):
    """Weights that are permuted together.

    Attributes:
        consumers: names of the layers whose columns get one order P; they read the same input.
        producers: names of the layers whose rows are put in that order, so that the consumers' input comes in
            it; empty if the consumers store P as `input_perm`.
        head_dim: d: P moves channels within blocks of d only. None: anywhere.
        repeats: r: so many consecutive blocks (the query heads of a KV head) share one order.
        interleaved: whether rows 2i and 2i + 1 of the producer belong to channel i.

    Names are those of modules (`nn.Linear` or `HadaCoreLinear`), or of the Parameters of fused experts
    ``[E, N, K]``: then every expert has an order of its own, ``[E, K]``.
    """

    consumers: tuple[str, ...]
    producers: tuple[str, ...]
    head_dim: int | None = None
    repeats: int = 1
    interleaved: bool = False

    def output_order(self, order: torch.Tensor, rows: int) -> torch.Tensor:
        """The order of a producer's rows, for `permute_outputs`.

        Args:
            order: integer ``[..., K]``, P: the consumers' column i is the natural column ``order[..., i]``.
            rows: N of the producer: a multiple of K, of which each K rows are permuted alike; with `head_dim`
                K / r, behind any number of rows that stay where they are (q and k of a fused projection).

        Returns:
            int64 ``[..., N]``.

        Raises:
            FormatError: the order leaves a head, or heads that share one differ.
        """
        order = order.long()
        k = order.shape[-1]
        if self.head_dim is not None:
            heads = order.unflatten(-1, (-1, self.repeats, self.head_dim))
            starts = torch.arange(0, k, self.head_dim, device=order.device).view(-1, self.repeats, 1)
            within = heads - starts
            if within.amin() < 0 or within.amax() >= self.head_dim or (within != within[..., :1, :]).any():
                raise FormatError(
                    f"the order of {self.consumers[0]}'s inputs must stay within heads of {self.head_dim} "
                    f"channels and be one for each {self.repeats} consecutive heads"
                )
            fixed = rows - k // self.repeats
            values = (within[..., 0, :] + starts[:, 0] // self.repeats + fixed).flatten(-2)
            front = torch.arange(fixed, device=order.device).expand(*order.shape[:-1], fixed)
            return torch.cat((front, values), dim=-1)
        if self.interleaved:
            return torch.stack((2 * order, 2 * order + 1), dim=-1).flatten(-2)
        return torch.cat([order + start for start in range(0, rows, k)], dim=-1)


def permute_outputs(
    weight: _Rows, bias: torch.Tensor | None, order: torch.Tensor
) -> tuple[_Rows, torch.Tensor | None]:
    """A layer whose output i is the given layer's output ``order[i]``.

    Args:
        weight: int4, or ``[..., N, K]`` of any dtype.
        bias: ``[..., N]``.
        order: int64 ``[N]`` or, one for each expert, ``[E, N]``; see `PermutationGroup.output_order`.

    Returns:
        Weight and bias, copies with the same scales and zeros for the same rows.
    """

    def permute(rows: torch.Tensor) -> torch.Tensor:
        if order.dim() == 1:
            return rows.index_select(-2, order)
        return rows.take_along_dim(order.unsqueeze(-1), dim=-2)

    permuted = None if bias is None else permute(bias.unsqueeze(-1)).squeeze(-1)
    if not isinstance(weight, Int4Weight):
        return permute(weight), permuted
    zero = None if weight.zero is None else permute(weight.zero)
    return weight._replace(packed=permute(weight.packed), scale=permute(weight.scale), zero=zero), permuted


def permute_inputs(weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The columns of a weight in another order: what is quantized, and what undoes it with the inverse.

    Args:
        weight: ``[..., N, K]``.
        order: int64 ``[K]`` or, one for each expert, ``[E, K]``.

    Returns:
        ``weight[..., order]``, a copy.
    """
    if order.dim() == 1:
        return weight.index_select(-1, order)
    return weight.take_along_dim(order.unsqueeze(-2), dim=-1)
