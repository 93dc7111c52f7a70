"""The forward of every Experts module: hop 1 of an expert's bytes.

transformers decorates each architecture's Experts class with ``use_experts_implementation``, which gives it the flags
has_gate, has_bias, is_transposed and has_post_expert_norm, and the method _apply_gate. Here such a module has no
parameters: what it multiplies with is leased. There are two ways to compute: ``eager.py``, bit for bit as the eager
model does, and ``grouped.py``, with records where they lie.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moetier.runtime.kernels.api import moved_error
from moetier.tiers.layout import RecordLayout

from .block import TieredBlock, arithmetic
from .eager import eager_forward
from .gradient import without_gradient
from .grouped import grouped_forward

EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Path -> module, in module order, of those that transformers' experts interface dispatches."""
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(type(module), "_apply_gate") and hasattr(module, "has_bias") and hasattr(module, "is_transposed")
    }


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]; ``self`` is the Experts module.

    Experts are computed in the order in which they arrive, and their outputs are kept until all can be added up, so
    that the result depends on no tier: T * k * H numbers at most, for which budgets leave room up to 4096
    tokens (``early_bytes``); a longer prefill takes more. A gradient that is asked for through the
    experts raises ConfigError in the backward pass.
    """
    here: TieredBlock = self.tiered
    if hidden_states.device != here.device:
        raise moved_error(hidden_states.device, here.device)
    forward = grouped_forward if here.kernels.packs(here.layout) else eager_forward
    with torch.no_grad():
        out = here.kernels.with_room(partial(forward, self, here, hidden_states, top_k_index, top_k_weights))
    return without_gradient(out, hidden_states, top_k_weights)


def early_bytes(module: Any, layout: RecordLayout, tokens: int, top_k: int, dtype: torch.dtype) -> int:
    """The most that outputs take which come early, in a prefill of ``tokens`` of a model of ``dtype``."""
    width = next(projection.rows for projection in layout.projections if projection.name == "down_proj")
    numbers = torch.empty(0, dtype=dtype)
    _, accumulate = arithmetic(module, numbers, numbers.float())  # some routers weigh in fp32
    return tokens * top_k * width * accumulate.itemsize
