"""Find the activation of an Experts module by a trial, because architectures write it in many ways."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from moetier.runtime.kernels.experts.expert_code import FUNCTIONS, Activation
from moetier.runtime.kernels.slots import activate
from moetier.runtime.libraries.transformers_internals import apply_gate

_SCALES = (0.3, 3.0, 30.0, 300.0)  # scales of a trial's random numbers, as an activation may be limited to some size
_TRIED = (64, 64)  # number of rows at each scale, and of numbers in each row
_ALPHAS, _LIMITS = ("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")  # attributes of modules that hold these values
_QUICK_GELU = 1.702  # alpha with which x * sigmoid(alpha * x) approximates GELU


def activation_of(module: Any) -> Activation | None:
    """Return the activation that gives the same results for random numbers as the module's own code.

    Returns None if no known activation does. Returns None, too, if the module normalises its experts' outputs:
    compiled code can't do that.
    """
    if getattr(module, "has_post_expert_norm", False):
        return None
    numbers = torch.randn(_TRIED, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    x = torch.cat([scale * numbers for scale in _SCALES])
    try:
        expected = (apply_gate(module, x) if module.has_gate else module.act_fn(x)).float()
    except Exception:  # the module's code needs more than these numbers
        return None
    for activation in _candidates(module):
        result = activate(activation, x)
        if result.shape == expected.shape and torch.allclose(result, expected, rtol=1e-5, atol=1e-6):
            return activation
    return None


def _candidates(module: Any) -> list[Activation]:
    alphas, limits = (
        [first, *(float(value) for name in names if isinstance(value := getattr(module, name, None), float | int))]
        for first, names in ((1.0, _ALPHAS), (math.inf, _LIMITS))
    )
    alphas.append(_QUICK_GELU)
    if not module.has_gate:
        return [Activation(function, alpha=alpha, gated=False) for function in FUNCTIONS for alpha in alphas]
    return [Activation(*way) for way in itertools.product(FUNCTIONS, (False, True), alphas, limits, (0.0, 1.0))]
