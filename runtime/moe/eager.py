"""The exact way to compute a block: expert by expert, bit for bit as the architecture's own eager forward."""

from __future__ import annotations

from collections import deque
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from moetier.tiers.quant.codec import sections

from .block import TieredBlock, arithmetic, groups, rows_of_experts


def eager_forward(
    self: Any, here: TieredBlock, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """As ``experts_forward`` says. Experts are computed in the order in which they arrive and added up in ascending
    order."""
    compute, accumulate = arithmetic(self, hidden_states, top_k_weights)
    rows = rows_of_experts(top_k_index, self.num_experts)
    waiting, early = deque(rows), dict[int, Tensor]()
    out = torch.zeros_like(hidden_states, dtype=accumulate)

    with closing(groups(here, rows)) as arriving:
        for leases in arriving:
            for lease in leases:
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
