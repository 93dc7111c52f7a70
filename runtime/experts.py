"""The forward of every Experts module: hop 1 of an expert's bytes.

transformers decorates each architecture's Experts class with ``use_experts_implementation``, which gives it the flags
has_gate, has_bias, is_transposed and has_post_expert_norm, and the method _apply_gate. Here such a module has no
parameters: what it multiplies with is leased, expert by expert. The result is bit for bit that of the architecture's
own eager forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from moetier.tiers.errors import ConfigError
from moetier.tiers.keys import ExpertKey, RecordLayout
from moetier.tiers.quantize import sections
from moetier.tiers.source import ExpertSource

from .kernels import Kernels

EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


@dataclass(frozen=True, slots=True)
class TieredBlock:
    """What an Experts module has in place of its parameters; its attribute ``tiered``."""

    block: int
    layout: RecordLayout
    source: ExpertSource[Tensor]
    kernels: Kernels
    device: torch.device  # of the records
    demanded: Callable[[int, Collection[int]], None] | None = None  # told of a demand, once it is made


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Path -> module, in module order, of those that transformers' experts interface dispatches."""
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(type(module), "_apply_gate") and hasattr(module, "has_bias") and hasattr(module, "is_transposed")
    }


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]; ``self`` is the Experts module.

    Experts are computed in the order in which they arrive and added up in ascending order, as eager does it, so that
    the result depends on no tier. What came early is kept as outputs: T * k * H numbers at most, for which budgets
    leave room up to registration's DEFAULT_CONTEXT tokens (``early_bytes``); a longer prefill takes more. A gradient
    that is asked for through the experts raises ConfigError in the backward pass.
    """
    with torch.no_grad():
        out = _forward(self, self.tiered, hidden_states, top_k_index, top_k_weights)
    if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
        return cast("Tensor", _NoGradient.apply(out, hidden_states, top_k_weights))
    return out


class _NoGradient(torch.autograd.Function):
    """Hands on what was computed, and raises when its gradient is wanted: it would be missing without a word.

    The trunk's parameters go on asking for gradients: torch multiplies in another order where they don't, and the model
    would no longer be bit for bit the ordinary one.
    """

    @staticmethod
    def forward(_: Any, out: Tensor, *wanting: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Any:
        raise ConfigError(
            "A gradient is wanted through the experts, which moetier does not compute: its models are for inference.",
            "Train the ordinary model, and convert what comes out.",
        )


def early_bytes(module: Any, layout: RecordLayout, tokens: int, top_k: int, dtype: torch.dtype) -> int:
    """The most that outputs take which come early, in a prefill of ``tokens`` of a model of ``dtype``."""
    width = next(projection.rows for projection in layout.projections if projection.name == "down_proj")
    numbers = torch.empty(0, dtype=dtype)
    _, accumulate = _arithmetic(module, numbers, numbers.float())  # some routers weigh in fp32
    return tokens * top_k * width * accumulate.itemsize


def _forward(self: Any, here: TieredBlock, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    if hidden_states.device != here.device:
        raise ConfigError(
            f"The model was moved to {hidden_states.device}; its experts are on {here.device}.",
            "Load it on the device where it is to run.",
        )
    compute, accumulate = _arithmetic(self, hidden_states, top_k_weights)
    rows = _rows_of_experts(top_k_index, self.num_experts)
    waiting, early = deque(rows), dict[int, Tensor]()
    out = torch.zeros_like(hidden_states, dtype=accumulate)
    tell = here.demanded
    with closing(here.source.acquire([ExpertKey(here.block, expert) for expert in rows])) as leases:
        for lease in leases:
            if tell is not None:
                tell(here.block, rows.keys())
                tell = None
            tokens, positions = rows[lease.key.expert]
            y = _expert(self, here, lease.record, hidden_states[tokens].to(compute))
            y = (y * top_k_weights[tokens, positions, None]).to(accumulate)
            if not lease.holds():
                continue  # its record was replaced while this was computed on it: it comes again
            early[lease.key.expert] = y
            while waiting and waiting[0] in early:
                expert = waiting.popleft()
                out.index_add_(0, rows[expert][0], early.pop(expert))
    assert not waiting
    return out.to(hidden_states.dtype)


def _expert(module: Any, here: TieredBlock, record: Tensor, x: Tensor) -> Tensor:
    """x [rows, H] -> [rows, H] through one expert."""

    def project(x: Tensor, name: str) -> Tensor:
        y = here.kernels.project(x, record, here.layout, name)
        return y + sections(record, here.layout)[f"{name}_bias"].to(y.dtype) if module.has_bias else y

    # _apply_gate is the architecture's: some interleave gate and up, some clamp
    x = module._apply_gate(project(x, "gate_up_proj")) if module.has_gate else module.act_fn(project(x, "up_proj"))
    x = project(x, "down_proj")
    return module.post_expert_norm(x) if module.has_post_expert_norm else x


def _rows_of_experts(top_k_index: Tensor, experts: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Expert -> (tokens, positions in their top-k), ascending; rows in eager's order, by position and then by token.

    An index of ``experts`` and more means "computed elsewhere" (expert parallelism).
    """
    index = top_k_index.cpu()  # one wait for the device, not one for each expert
    rows = {}
    for expert in torch.unique(index).tolist():
        if expert < experts:
            positions, tokens = torch.where((index == expert).T)
            rows[expert] = (tokens.to(top_k_index.device), positions.to(top_k_index.device))
    return rows


def _arithmetic(module: Any, hidden_states: Tensor, top_k_weights: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The types that the architecture's eager forward multiplies in and adds up in: no flag of transformers says so."""
    match type(module).__name__:
        case "OpenAIPrivacyFilterExperts":
            return torch.float32, torch.float32
        case "Inkling2Experts" | "Inkling2LoopExperts":
            return hidden_states.dtype, torch.float32
        case "NemotronHExperts":
            return hidden_states.dtype, top_k_weights.dtype
        case _:
            return hidden_states.dtype, hidden_states.dtype
