"""What calibration knows of a layer's input: H = E[x x^T], and its factors for GPTQ.

For an output row with error d the layer's squared output error is d^T H d, summed over rows. Layers that read
the same input (q/k/v; gate/up) have one H, and one factorization of it serves them all.
"""

from typing import NamedTuple

import torch

from ..errors import QuantizationError

# Damping grows tenfold until the Cholesky factorization succeeds. With a mean diagonal added, every Gram
# matrix is positive definite beyond doubt; what still fails is none.
_LARGEST_DAMPING = 1.0
_SMALLEST_STEP = 1e-4


class Hessian:
    """Streams E[x x^T] in fp32.

    Args:
        k: K, the number of channels.
        device: where the sum ``[K, K]`` lives.
        name: how errors call the input.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu", *, name: str = "input"):
        self.name = name
        self.rows = 0
        self._sum = torch.zeros(k, k, dtype=torch.float32, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Count a batch.

        Args:
            x: floating point ``[..., K]``, any leading shape, on any device.

        Raises:
            QuantizationError: x has not K channels.
        """
        k = self._sum.shape[0]
        if x.shape[-1] != k:
            raise QuantizationError(f"{self.name}: expected {k} channels, found shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, k).to(self._sum.device)
        self.rows += rows.shape[0]
        if rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16):
            # Tensor cores: the products are exact and are summed in fp32.
            self._sum += torch.mm(rows.T, rows, out_dtype=torch.float32)
        else:
            rows = rows.float()
            self._sum.addmm_(rows.T, rows)

    def matrix(self) -> torch.Tensor:
        """fp32 ``[K, K]``, the mean over all rows; zeros if there were none.

        Raises:
            QuantizationError: an input was NaN or infinite, or its square left the range of fp32.
        """
        check_finite(self._sum, self.name)
        return self._sum / max(1, self.rows)


class FactorizedHessian(NamedTuple):
    """H + damping, its channels in the order of quantization, as U diag(v) U^T.

    Attributes:
        matrix: fp32 ``[K, K]``, H itself, in natural order, without damping.
        order: int64 ``[K]``, the channel that is quantized first, second ...; None is the natural order.
        factor: fp32 ``[K, K]``, U: upper triangular with a diagonal of ones, in that order.
        variance: fp32 ``[K]``, v in that order: what a squared error in a channel costs once the channels
            after it have been adjusted as well as they can be.
        damping: the fraction of the mean diagonal that was added.
    """

    matrix: torch.Tensor
    order: torch.Tensor | None
    factor: torch.Tensor
    variance: torch.Tensor
    damping: float


def factorize(
    hessian: torch.Tensor,
    *,
    order: torch.Tensor | None = None,
    damping: float = 0.01,
    name: str = "weight",
) -> FactorizedHessian:
    """Factorize H for `gptq.gptq_quantize`.

    Channels that calibration never saw (zeros) get the mean diagonal: they neither adjust others nor are
    adjusted, and are rounded to the nearest.

    Args:
        hessian: fp32 ``[K, K]``, symmetric, positive semidefinite.
        order: int64 ``[K]``, a permutation; see `act_order.falling_diagonal`.
        damping: fraction of the mean diagonal added to the diagonal; grows tenfold while H is singular.
        name: how errors call the layer.

    Raises:
        QuantizationError: H holds NaN or infinite values or is not positive semidefinite, its shape is not
            square, or the order is no permutation of its channels.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise QuantizationError(f"{name}: a Hessian is [K, K], found shape {tuple(hessian.shape)}")
    check_finite(hessian, name)
    if (hessian.diagonal() < 0).any():
        raise QuantizationError(f"{name}: the Hessian has a negative diagonal; it is no mean of x x^T")
    if order is not None:
        check_permutation(order, hessian.shape[0], name)
        order = order.to(hessian.device)
    while True:
        # H = U diag(v) U^T eliminates from the last channel: Cholesky's L L^T of the reversed matrix.
        lower, info = torch.linalg.cholesky_ex(damped(hessian, damping, order).flip(0, 1))
        if not info and lower.isfinite().all():
            break
        if damping >= _LARGEST_DAMPING:
            raise QuantizationError(
                f"{name}: the Hessian is not positive semidefinite, even with {damping:g} of its mean "
                "diagonal added"
            )
        damping = min(max(damping * 10, _SMALLEST_STEP), _LARGEST_DAMPING)
    upper = lower.flip(0, 1)
    root = upper.diagonal().clone()
    return FactorizedHessian(hessian, order, upper.div_(root), root.square(), damping)


def damped(hessian: torch.Tensor, damping: float, order: torch.Tensor | None = None) -> torch.Tensor:
    """A copy of H whose diagonal is raised, and is positive where calibration saw nothing.

    Args:
        hessian: fp32 ``[K, K]``.
        damping: fraction of the mean over all channels that were seen; it also is what others get.
        order: int64 ``[K]``, of the result's channels.
    """
    diagonal = hessian.diagonal()
    is_seen = diagonal > 0
    # Errors are judged relative to each other: where nothing was seen, any mean does.
    mean = float(diagonal[is_seen].mean()) if is_seen.any() else 1.0
    raised = torch.where(is_seen, diagonal, mean) + damping * mean
    copy = hessian.clone() if order is None else hessian[order][:, order]
    copy.diagonal().copy_(raised if order is None else raised[order])
    return copy


def check_finite(hessian: torch.Tensor, name: str) -> None:
    """Raise if a Hessian holds NaN or infinite values.

    Raises:
        QuantizationError: naming the layer and the first channel.
    """
    bad = ~hessian.diagonal().isfinite()
    if not bad.any():
        bad = ~hessian.isfinite().all(dim=1)
    if bad.any():
        raise QuantizationError(
            f"{name}: {int(bad.sum())} of {len(bad)} input channels are NaN or infinite in calibration "
            f"(or their squares overflow fp32), the first is channel {int(bad.nonzero()[0])}"
        )


def check_permutation(order: torch.Tensor, k: int, name: str) -> None:
    """Raise unless an order holds every channel once.

    Raises:
        QuantizationError: naming the layer.
    """
    if tuple(order.shape) != (k,) or not torch.equal(
        order.sort().values.cpu(), torch.arange(k, dtype=order.dtype)
    ):
        raise QuantizationError(f"{name}: the order is no permutation of {k} channels")
