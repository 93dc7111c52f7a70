"""Half-quadratic quantisation (HQQ): choose the quantisation levels of each group of weights.

The solver is that of Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", as it is in
the package hqq (``hqq.core.optimize.optimize_weights_proximal_legacy``). The scale s is the distance of two levels, and
follows from the range of the group. The offset b is found by alternating between rounding and a proximal step for the
l_0.7 norm of the error. A weight is w = code * s + b, where codes are centred on zero. In this form, s = 0 needs no
special case.

This module differs from the package hqq in two points. It does not clamp the inverse of s at 2e4: the clamp would cost
small weights most of their bits. And each group keeps the best offset of all iterations. So the result of a group
depends only on its own weights: not on other groups, the number of threads or the processor. Up to the last bits of
fp32, the result is never worse than plain rounding.

This module is the reference. ``runtime.kernels.quantise.encode`` does the same operations in compiled code, and makes
the same bytes.

Tensors of weights are w [n, g, LANES]. They have n * LANES groups of g weights each: a group lies along the second
dimension, and LANES groups are side by side. So the processor's vector instructions work on several groups at a time,
even for sums over a group.
"""

from __future__ import annotations

import operator
from itertools import accumulate

import torch
from torch import Tensor

from moetier.tiers.layout import ROW_TILE

LANES = ROW_TILE
ITERATIONS = 15
LP_NORM = 0.7  # p of the l_p norm of the error
BETA = 10.0  # weight of the proximal step in the first iteration
KAPPA = 1.01  # factor by which the weight grows in each iteration
SOLVER = 2  # version of the solver: two versions may find different codes for the same weights
TINY = torch.finfo(torch.float32).tiny  # a smaller scale would be denormal, so the group is treated as constant
# Newton's method for x^-0.3. The bits of its first fp32 approximation are GUESS[0] times the bits of x, plus GUESS[1].
# After NEWTON iterations, the result does not become more precise in fp64.
GUESS = (-0.3, 1.3 * 127 * 2**23)
NEWTON = 6


def scales(w: Tensor, bits: int) -> Tensor:
    """Return the scale of each group, [n, 1, LANES]: the distance of two levels, which span the range of the group.

    w is fp32 [n, g, LANES]. The scale is 0 if all weights of the group are equal, and not finite if a weight or the
    range of the group is not finite.
    """
    scale: Tensor = (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / (2**bits - 1)  # 20 times faster than aminmax
    return scale.masked_fill_(scale < TINY, 0.0)


def plain_offsets(w: Tensor, scale: Tensor) -> Tensor:
    """Return the offset b of each group for plain rounding, [n, 1, LANES]: it centres the levels on the group's range.

    w is [n, g, LANES], scale is [n, 1, LANES].
    """
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    return low + (high - low) / 2 + scale / 2


def centred_codes(w: Tensor, scale: Tensor, offset: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Return the nearest code of each weight, [n, g, LANES]: an integer from -2^(bits-1) to 2^(bits-1) - 1.

    w is [n, g, LANES], scale and offset are [n, 1, LANES]. If ``out`` is given, the codes are written to it.
    """
    half = 2 ** (bits - 1)
    return torch.sub(w, offset, out=out).mul_(_inverse(scale)).round_().clamp_(-half, half - 1)


def solve(w: Tensor, scale: Tensor, bits: int, scratch: Tensor | None = None) -> Tensor:
    """Return the offset b that HQQ finds for each group, [n, 1, LANES].

    Args:
        w: weights, fp32 [n, g, LANES].
        scale: the scale of each group, [n, 1, LANES].
        bits: bits per weight.
        scratch: memory to work in, fp32 [3, n, g, LANES]; None to allocate it.
    """
    scaled, error, codes = torch.empty(3, *w.shape) if scratch is None else scratch
    half = 2 ** (bits - 1)
    plain, inverse = plain_offsets(w, scale), _inverse(scale)
    # weights and offsets are now relative to ``plain``, and divided by the scale
    torch.sub(w, plain, out=scaled).mul_(inverse)
    best = offset = torch.zeros_like(scale)
    least = torch.full_like(scale, torch.inf)
    for threshold, beta in shrinking():
        torch.sub(scaled, offset, out=error)
        torch.round(error, out=codes).clamp_(-half, half - 1)
        error.sub_(codes)
        size = torch.abs(error, out=codes).sum(1, keepdim=True)
        better = size < least
        best, least = torch.where(better, offset, best), torch.where(better, size, least)
        if float((codes.amax(1, keepdim=True) * scale).max()) > threshold:  # false for weights of the usual size
            large = (codes.mul_(scale) > threshold).nonzero(as_tuple=True)
            shrunk = _shrink(error[large] * scale.expand_as(error)[large], beta)
            error[large] -= shrunk * inverse.expand_as(error)[large]
        offset = offset + error.sum(1, keepdim=True) / w.shape[1]
    return (best * scale).add_(plain)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale < TINY, 0.0, 1 / scale)


def shrinking() -> list[tuple[float, float]]:
    """For each iteration, return the largest error that ``_shrink`` maps to 0, and the weight of the proximal step."""
    betas = list(accumulate([BETA] + [KAPPA] * (ITERATIONS - 1), operator.mul))
    return [(beta ** (-1 / (2 - LP_NORM)), beta) for beta in betas]


def _shrink(error: Tensor, beta: float) -> Tensor:
    """Return sign(e) max(0, |e| - |e|^(p-1) / beta) for each error e: the proximal operator of the l_p norm."""
    size = error.abs()
    return (size - power(size) / beta).clamp_min_(0.0).mul_(error.sign())


def power(x: Tensor) -> Tensor:
    """Return x^(p-1) = x^-0.3, rounded to fp32, for fp32 numbers x [n] >= 0. For 0, the result is some large number.

    torch's own power of fp32 numbers differs between processors in the last bit. So y = x^-0.3 is computed in fp64 as
    the solution of y^-10 = x^3, by Newton's method, whose operations every processor rounds in the same way.
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
