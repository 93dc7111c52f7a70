"""Forward pass of every Experts module, with experts that are leased from a device tier.

transformers decorates each architecture's Experts class with ``use_experts_implementation``, which gives it the flags
has_gate, has_bias, is_transposed and has_post_expert_norm, and the method _apply_gate. moetier takes the parameters of
such a module away. There are two ways to compute a block: exactly, expert by expert, bit for bit as the architecture's
own eager forward does (here), and quickly, with quantised records where they lie (``grouped.py``).
"""

from __future__ import annotations

from collections import deque
from contextlib import closing
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from moetier.runtime.kernels.api import moved_error
from moetier.tiers.errors import ConfigError
from moetier.tiers.layout import RecordLayout
from moetier.tiers.quant.codec import sections

from .block import TieredBlock, arithmetic, groups, rows_of_experts
from .grouped import grouped_forward

EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Path -> module of all Experts modules that transformers' experts interface dispatches, in module order."""
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(type(module), "_apply_gate") and hasattr(module, "has_bias") and hasattr(module, "is_transposed")
    }


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the forward pass of the Experts module ``self``.

    Experts are computed in the order in which they arrive. Their outputs are kept until all can be added up in a fixed
    order, so that the result depends on no tier. They are tokens * top_k * hidden numbers at most, for which budgets
    leave room up to 4096 tokens (``output_bytes``); a longer prefill takes more.

    Args:
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, top_k].
        top_k_weights: [tokens, top_k].

    Returns:
        [tokens, hidden]. If a gradient through it is asked for, the backward pass raises ConfigError.
    """
    here: TieredBlock = self.tiered
    if hidden_states.device != here.device:
        raise moved_error(hidden_states.device, here.device)
    forward = grouped_forward if here.kernels.packs(here.layout) else _eager_forward
    with torch.no_grad():
        out = here.kernels.with_room(partial(forward, self, here, hidden_states, top_k_index, top_k_weights))
    return without_gradient(out, hidden_states, top_k_weights)


def output_bytes(module: Any, layout: RecordLayout, tokens: int, top_k: int, dtype: torch.dtype) -> int:
    """The most bytes that experts' outputs take in a prefill of ``tokens`` of a model of ``dtype``."""
    width = next(projection.rows for projection in layout.projections if projection.name == "down_proj")
    numbers = torch.empty(0, dtype=dtype)
    _, accumulate = arithmetic(module, numbers, numbers.float())  # some routers weigh in fp32
    return tokens * top_k * width * accumulate.itemsize


def _eager_forward(
    self: Any, here: TieredBlock, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute as ``experts_forward`` says; outputs are added up in ascending order of their experts."""
    compute, accumulate = arithmetic(self, hidden_states, top_k_weights)
    rows = rows_of_experts(top_k_index, self.num_experts)
    waiting, computed = deque(rows), dict[int, Tensor]()
    out = torch.zeros_like(hidden_states, dtype=accumulate)

    with closing(groups(here, rows)) as arriving:
        for leases in arriving:
            for lease in leases:
                tokens, positions = rows[lease.key.expert]
                y = _expert(self, here, lease.record, hidden_states[tokens].to(compute))
                y = (y * top_k_weights[tokens, positions, None]).to(accumulate)
                if not lease.holds():
                    continue  # its record was replaced while this was computed on it: it comes again
                computed[lease.key.expert] = y
                while waiting and waiting[0] in computed:
                    expert = waiting.popleft()
                    out.index_add_(0, rows[expert][0], computed.pop(expert))
    assert not waiting
    return out.to(hidden_states.dtype)


def _expert(module: Any, here: TieredBlock, record: Tensor, x: Tensor) -> Tensor:
    """x [rows, hidden] -> [rows, hidden] through one expert."""

    def project(x: Tensor, name: str) -> Tensor:
        y = here.kernels.project(x, record, here.layout, name)
        return y + sections(record, here.layout)[f"{name}_bias"].to(y.dtype) if module.has_bias else y

    # _apply_gate is the architecture's: some interleave gate and up, some clamp
    x = module._apply_gate(project(x, "gate_up_proj")) if module.has_gate else module.act_fn(project(x, "up_proj"))
    x = project(x, "down_proj")
    return module.post_expert_norm(x) if module.has_post_expert_norm else x


def without_gradient(out: Tensor, *inputs: Tensor) -> Tensor:
    """Return ``out``, which was computed from ``inputs`` without a gradient; its backward pass raises ConfigError.

    All may have any shape, such as [tokens, hidden].

    Otherwise the gradient would silently be None. The trunk's parameters go on requiring gradients: torch multiplies in
    another order where they don't, and the model would no longer be bit for bit the ordinary one.
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
