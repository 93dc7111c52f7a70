"""Half-quadratic quantisation (HQQ): choose the quantisation levels of each group of weights.

The solver is that of Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", as in the hqq
package (``hqq.core.optimize.optimize_weights_proximal_legacy``). The step s between levels follows from the range of
the group. The offset b is found by alternating between rounding and a proximal step for the l_0.7 norm of the error.
Here weights are w = code * s + b with codes centred on zero, a form in which s = 0 needs no special case.

There are two differences from the package. The inverse step is not clamped at 2e4, as the clamp would cost small
weights most of their bits. And each group keeps the best offset of all iterations, so its result depends only on its
own weights: not on other groups, the number of threads or the processor. Up to the last bits of fp32, the result is
never worse than plain rounding.

This is the reference. ``runtime.kernels.quantise`` does the same operations in compiled code, and makes the same bytes.

Tensors of weights are w [n, g, LANES]: n * LANES groups of g weights each, where LANES groups are side by side in the
last dimension. So the processor's vector instructions work on several groups at a time, even for sums over a group.
"""

from __future__ import annotations

import operator
from itertools import accumulate

import torch
from torch import Tensor

from moetier.tiers.layout import ROW_TILE

LANES = ROW_TILE
ITERATIONS = 15
LP_NORM = 0.7  # p of the norm of the error
BETA = 10.0  # weight of the proximal step at first
KAPPA = 1.01  # factor of that weight from one iteration to the next
SOLVER = 2  # version of the solver; another one may find other codes for the same weights
TINY = torch.finfo(torch.float32).tiny  # a smaller step would be a denormal number, so the group is treated as constant
# First guess of the bits of x^-0.3 as an fp32 number: GUESS[0] times the bits of x, plus GUESS[1]; and the number of
# iterations of Newton's method from there, at which fp64 has nothing to gain
GUESS = (-0.3, 1.3 * 127 * 2**23)
NEWTON = 6


def steps(w: Tensor, bits: int) -> Tensor:
    """Compute the step between levels of each group, [n, 1, LANES], so that the levels span the group's range.

    w is fp32 [n, g, LANES]. The step is 0 for a constant group, and not finite if a weight or the range is not.
    """
    step: Tensor = (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / (2**bits - 1)  # 20 times faster than aminmax
    return step.masked_fill_(step < TINY, 0.0)


def plain_offsets(w: Tensor, step: Tensor) -> Tensor:
    """Compute the offsets b for plain rounding, [n, 1, LANES]. They centre the levels on the range of each group.

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
    """Find the offsets b, [n, 1, LANES], with HQQ for given steps.

    w is fp32 [n, g, LANES], step is [n, 1, LANES]. ``scratch`` is memory to work in, fp32 [3, n, g, LANES].
    """
    scaled, error, codes = torch.empty(3, *w.shape) if scratch is None else scratch
    half = 2 ** (bits - 1)
    plain, inverse = plain_offsets(w, step), _inverse(step)
    torch.sub(w, plain, out=scaled).mul_(inverse)  # from here on, in units of a step and relative to ``plain``
    best = offset = torch.zeros_like(step)
    least = torch.full_like(step, torch.inf)
    for threshold, beta in shrinking():
        torch.sub(scaled, offset, out=error)
        torch.round(error, out=codes).clamp_(-half, half - 1)
        error.sub_(codes)
        size = torch.abs(error, out=codes).sum(1, keepdim=True)
        better = size < least
        best, least = torch.where(better, offset, best), torch.where(better, size, least)
        if float((codes.amax(1, keepdim=True) * step).max()) > threshold:  # not for weights of usual size
            large = (codes.mul_(step) > threshold).nonzero(as_tuple=True)
            shrunk = _shrink(error[large] * step.expand_as(error)[large], beta)
            error[large] -= shrunk * inverse.expand_as(error)[large]
        offset = offset + error.sum(1, keepdim=True) / w.shape[1]
    return (best * step).add_(plain)


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step < TINY, 0.0, 1 / step)


def shrinking() -> list[tuple[float, float]]:
    """Return for each iteration the largest error that ``_shrink`` maps to 0, and the weight of the proximal step."""
    betas = list(accumulate([BETA] + [KAPPA] * (ITERATIONS - 1), operator.mul))
    return [(beta ** (-1 / (2 - LP_NORM)), beta) for beta in betas]


def _shrink(error: Tensor, beta: float) -> Tensor:
    """Apply the proximal operator of the l_p norm to errors e: sign(e) max(0, |e| - |e|^(p-1) / beta)."""
    size = error.abs()
    return (size - power(size) / beta).clamp_min_(0.0).mul_(error.sign())


def power(x: Tensor) -> Tensor:
    """Compute x^(p-1) = x^-0.3 of fp32 numbers x [n], rounded to fp32. They are at least 0; 0 gives some large number.

    y = x^-0.3 solves y^-10 = x^3. Newton's method takes only operations that every processor rounds alike, and computes
    in fp64; processors differ in the last bit of an fp32 power.
    """
    y = (x.view(torch.int32).double() * GUESS[0] + GUESS[1]).to(torch.int32).view(torch.float32).double()
    wide = x.double()
    cube = wide * wide * wide
    for _ in range(NEWTON):
        y2 = y * y
        y4 = y2 * y2
        y10 = y4 * y4 * y2
        y = y + y * (1 - cube * y10) / 10
    return y.float()
