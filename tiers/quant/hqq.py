"""Half-quadratic quantisation (HQQ): choose the levels of each group of weights.

The solver is that of Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", as in the hqq
package (``hqq.core.optimize.optimize_weights_proximal_legacy``). The range of the group gives the step between levels.
The offset is found by alternating between rounding and a proximal step for the l_0.7 norm of the error. Here weights
are w = code * s + b with codes centred on zero, where s = 0 needs no special case.

There are two differences from the package. The inverse step is not clamped at 2e4, which would cost small weights most
of their bits. And each group keeps the best offset that it met. So a group's result depends on its weights alone, not
on its neighbours, the size of the work, the number of threads or the kind of processor. Up to the last bits of fp32 it
is never worse than plain rounding.

Groups lie side by side: w is [n, g, LANES], n * LANES groups of g weights. So the processor's vectors work on LANES
groups at a time, even for sums over a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetier.tiers.layout import ROW_TILE

LANES = ROW_TILE
ITERATIONS = 15
LP_NORM = 0.7
BETA = 10.0
KAPPA = 1.01
TINY = torch.finfo(torch.float32).tiny  # a smaller step would be a denormal: the group counts as constant


def steps(w: Tensor, bits: int) -> Tensor:
    """Compute the step between levels, [n, 1, LANES], that spans the range of each group of w, fp32 [n, g, LANES].

    It is 0 for a constant group, and not finite where a weight or the range is not.
    """
    step: Tensor = (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / (2**bits - 1)  # 20 times faster than aminmax
    return step.masked_fill_(step < TINY, 0.0)


def plain_offsets(w: Tensor, step: Tensor) -> Tensor:
    """Compute the offsets b of plain rounding, [n, 1, LANES], which centre the levels on the range of each group.

    w is [n, g, LANES], step is [n, 1, LANES].
    """
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    return low + (high - low) / 2 + step / 2


def centred_codes(w: Tensor, step: Tensor, offset: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Compute the nearest codes, [n, g, LANES]: integers from -2^(bits-1) to 2^(bits-1) - 1.

    w is [n, g, LANES], step and offset are [n, 1, LANES].
    """
    half = 2 ** (bits - 1)
    return torch.sub(w, offset, out=out).mul_(_inverse(step)).round_().clamp_(-half, half - 1)


def solve(w: Tensor, step: Tensor, bits: int, scratch: Tensor | None = None) -> Tensor:
    """Find the offsets b, [n, 1, LANES], with HQQ. The steps stay as they are.

    w is fp32 [n, g, LANES], step is [n, 1, LANES], ``scratch`` is [3, n, g, LANES] of any content.
    """
    scaled, error, codes = torch.empty(3, *w.shape) if scratch is None else scratch
    half = 2 ** (bits - 1)
    plain, inverse, beta = plain_offsets(w, step), _inverse(step), BETA
    torch.sub(w, plain, out=scaled).mul_(inverse)  # from here on in units of a step, offsets relative to ``plain``
    best = offset = torch.zeros_like(step)
    least = torch.full_like(step, torch.inf)
    for _ in range(ITERATIONS):
        torch.sub(scaled, offset, out=error)
        torch.round(error, out=codes).clamp_(-half, half - 1)
        error.sub_(codes)
        size = torch.abs(error, out=codes).sum(1, keepdim=True)
        better = size < least
        best, least = torch.where(better, offset, best), torch.where(better, size, least)
        if float((codes.amax(1, keepdim=True) * step).max()) > _threshold(beta):  # never for weights of usual size
            large = (codes.mul_(step) > _threshold(beta)).nonzero(as_tuple=True)
            shrunk = _shrink(error[large] * step.expand_as(error)[large], beta)
            error[large] -= shrunk * inverse.expand_as(error)[large]
        offset = offset + error.sum(1, keepdim=True) / w.shape[1]
        beta *= KAPPA
    return (best * step).add_(plain)


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step < TINY, 0.0, 1 / step)


def _threshold(beta: float) -> float:
    """The largest error that shrinks to 0."""
    return float(beta ** (-1 / (2 - LP_NORM)))


def _shrink(error: Tensor, beta: float) -> Tensor:
    """The proximal operator of the l_p norm: sign(e) max(0, |e| - |e|^(p-1) / beta)."""
    size = error.abs()
    power = size.double().pow(LP_NORM - 1).float()  # in fp64: the last bit of fp32 depends on the processor
    return (size - power / beta).clamp_min_(0.0).mul_(error.sign())
