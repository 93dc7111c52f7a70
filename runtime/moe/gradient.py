"""What is computed here has no gradient, and says so when one is wanted: it would be missing without a word."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from moetier.tiers.errors import ConfigError


def without_gradient(out: Tensor, *inputs: Tensor) -> Tensor:
    """``out``, that was computed from ``inputs``; it raises ConfigError in the backward pass.

    The trunk's parameters go on asking for gradients: torch multiplies in another order where they don't, and the model
    would no longer be bit for bit the ordinary one.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return cast("Tensor", _NoGradient.apply(out, *inputs))  # type: ignore[no-untyped-call, unused-ignore]
    return out


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Any:
        raise ConfigError(
            "A gradient is wanted through the experts, or through a quantised matrix of the trunk, which moetier does "
            "not compute: its models are for inference.",
            "Train the ordinary model, and convert what comes out.",
        )
