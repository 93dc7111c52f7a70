"""Half-quadratic quantisation: where to put the levels of each group of weights.

The solver is that of Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", as the hqq
package has it (``hqq.core.optimize.optimize_weights_proximal_legacy``): the step between levels is given by the range
of the group, the offset is found by alternating between rounding and a proximal step for the l_0.7 norm of the error.
It is written here in the form w = code * s + b with codes centred on zero, in which s = 0 needs no special case.

What differs from the package: no clamp of the inverse step at 2e4 (which costs small weights most of their bits), and
each group keeps the best offset that it met. So a group's result depends on its weights alone, not on its neighbours,
the size of the work, the number of threads or the kind of processor, and (up to fp32's last bits) is never worse than
plain rounding.

Groups lie side by side: w is [n, g, LANES], n * LANES groups of g weights, so that whatever is done to a group is done
to LANES of them by the processor's vectors, sums over a group among it.
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
TINY = torch.finfo(torch.float32).tiny  # a step below it would be a denormal: the group is as good as constant


def steps(w: Tensor, bits: int) -> Tensor:
    """[n, g, LANES] fp32 -> [n, 1, LANES]: the distance between levels that spans each group's range; 0 if it is
    constant. Not finite where a weight, or the range, is not.
    """
    step: Tensor = (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / (2**bits - 1)  # 20 times faster than aminmax
    return step.masked_fill_(step < TINY, 0.0)


def plain_offsets(w: Tensor, step: Tensor) -> Tensor:
    """[n, g, LANES], [n, 1, LANES] -> [n, 1, LANES]: b of plain rounding, which centres the levels on the range."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    return low + (high - low) / 2 + step / 2


def centred_codes(w: Tensor, step: Tensor, offset: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """[n, g, LANES], twice [n, 1, LANES] -> [n, g, LANES]: the nearest codes, integers in -2^(bits-1) ..
    2^(bits-1) - 1."""
    half = 2 ** (bits - 1)
    return torch.sub(w, offset, out=out).mul_(_inverse(step)).round_().clamp_(-half, half - 1)


def solve(w: Tensor, step: Tensor, bits: int, scratch: Tensor | None = None) -> Tensor:
    """[n, g, LANES] fp32, [n, 1, LANES] -> [n, 1, LANES]: the offsets b that HQQ finds for steps that stay as they are.

    ``scratch``, if given, is [3, n, g, LANES]; what it holds does not matter, before or after.
    """
    scaled, error, codes = torch.empty(3, *w.shape) if scratch is None else scratch
    half = 2 ** (bits - 1)
    plain, inverse, beta = plain_offsets(w, step), _inverse(step), BETA
    torch.sub(w, plain, out=scaled).mul_(inverse)  # from here on all is in steps, and offsets are counted from plain
    best = offset = torch.zeros_like(step)
    least = torch.full_like(step, torch.inf)
    for _ in range(ITERATIONS):
        torch.sub(scaled, offset, out=error)
        torch.round(error, out=codes).clamp_(-half, half - 1)
        error.sub_(codes)
        size = torch.abs(error, out=codes).sum(1, keepdim=True)
        better = size < least
        best, least = torch.where(better, offset, best), torch.where(better, size, least)
        if float((codes.amax(1, keepdim=True) * step).max()) > _threshold(
            beta
        ):  # which weights of usual size never are
            large = (codes.mul_(step) > _threshold(beta)).nonzero(as_tuple=True)
            shrunk = _shrink(error[large] * step.expand_as(error)[large], beta)
            error[large] -= shrunk * inverse.expand_as(error)[large]
        offset = offset + error.sum(1, keepdim=True) / w.shape[1]
        beta *= KAPPA
    return (best * step).add_(plain)


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step < TINY, 0.0, 1 / step)


def _threshold(beta: float) -> float:
    """The largest error that shrinks to nothing."""
    return float(beta ** (-1 / (2 - LP_NORM)))


def _shrink(error: Tensor, beta: float) -> Tensor:
    """The proximal operator of the l_p norm: sign(e) max(0, |e| - |e|^(p-1) / beta)."""
    size = error.abs()
    power = size.double().pow(LP_NORM - 1).float()  # in fp64, because fp32's last bit depends on the kind of processor
    return (size - power / beta).clamp_min_(0.0).mul_(error.sign())
