"""Refuse a backward pass through what moetier computes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from moetier.tiers.errors import ConfigError


def without_gradient(out: Tensor, *inputs: Tensor) -> Tensor:
    """Return ``out``, computed from ``inputs`` without gradients, with a backward pass that raises ConfigError.

    Without this, gradients would silently be None. Gradients are not just switched off for the trunk's parameters,
    because then torch would multiply in another order, and the results would no longer have the same bits as the
    original model's. All tensors may have any shape, such as [tokens, hidden].
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
