"""Half-quadratic quantisation: where to put the levels of each group of weights.

The solver is that of Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", as the hqq
package has it (``hqq.core.optimize.optimize_weights_proximal_legacy``): the step between levels is given by the range
of the group, the offset is found by alternating between rounding and a proximal step for the l_0.7 norm of the error.
It is written here in the form w = code * s + b with codes centred on zero, in which s = 0 needs no special case.

What differs from the package: no clamp of the inverse step at 2e4 (which costs small weights most of their bits), and
each group stops on its own and keeps the best offset that it met. So a group's result depends on its weights alone, not
on its neighbours, the size of the work, the number of threads or the kind of processor, and is never worse than plain
rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = 4096  # solved together: their temporaries stay in the processor's caches
ITERATIONS = 20
LP_NORM = 0.7
BETA = 10.0
KAPPA = 1.01
TINY = torch.finfo(torch.float32).tiny  # a step below it would be a denormal: the group is as good as constant


def steps(w: Tensor, bits: int) -> Tensor:
    """[groups, g] fp32 -> [groups]: the distance between levels that spans each group's range; 0 if it is constant.

    Not finite where a weight, or the range, is not.
    """
    low, high = w.aminmax(dim=1)
    step: Tensor = (high - low) / (2**bits - 1)
    return step.masked_fill_(step < TINY, 0.0)


def plain_offsets(w: Tensor, step: Tensor) -> Tensor:
    """[groups, g], [groups] -> [groups]: b of plain rounding, which centres the levels on the group's range."""
    low, high = w.aminmax(dim=1)
    return low + (high - low) / 2 + step / 2


def centred_codes(w: Tensor, step: Tensor, offset: Tensor, bits: int) -> Tensor:
    """[groups, g], [groups], [groups] -> [groups, g]: the nearest codes, integers in -2^(bits-1) .. 2^(bits-1) - 1."""
    inverse = torch.where(step < TINY, 0.0, 1 / step)
    half = 2 ** (bits - 1)
    return (w - offset[:, None]).mul_(inverse[:, None]).round_().clamp_(-half, half - 1)


def residual(w: Tensor, step: Tensor, offset: Tensor, bits: int) -> Tensor:
    """[groups, g]: w less its nearest level."""
    codes = centred_codes(w, step, offset, bits)
    return torch.sub(w, offset[:, None]).sub_(codes.mul_(step[:, None]))


def solve(w: Tensor, step: Tensor, bits: int) -> Tensor:
    """[groups, g] fp32, [groups] -> [groups]: the offsets b that HQQ finds for steps that stay as they are."""
    best = plain_offsets(w, step)
    error = residual(w, step, best, bits)
    best_error = error.abs().mean(1)
    offset, active, beta = best.clone(), torch.arange(len(w), device=w.device), BETA
    for _ in range(ITERATIONS - 1):
        offset = offset + (error - _shrink(error, beta)).mean(1)
        error = residual(w, step, offset, bits)
        mean_error = error.abs().mean(1)
        better = (mean_error < best_error).nonzero().squeeze(1)
        if not len(better):
            break
        active, w, step = active[better], w[better], step[better]
        offset, error, best_error = offset[better], error[better], mean_error[better]
        best[active] = offset
        beta *= KAPPA
    return best


def _shrink(error: Tensor, beta: float) -> Tensor | float:
    """The proximal operator of the l_p norm: sign(e) max(0, |e| - |e|^(p-1) / beta)."""
    size = error.abs()
    if float(size.max()) <= beta ** (-1 / (2 - LP_NORM)):
        return 0.0  # what the formula gives for errors up to there, as nearly all are; saves the power
    power = size.double().pow(LP_NORM - 1).float()  # in fp64, because fp32's last bit depends on the kind of processor
    return size.sub_(power / beta).clamp_min_(0.0).mul_(error.sign())
