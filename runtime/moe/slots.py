"""Blocks of a device whose experts are computed together, from the records in its slots.

The host waits for the device once in a block, to learn which experts it needs. Those that are in slots are computed by
two launches for all of them; each of the others by two more when its copy was queued.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moetier.runtime.kernels.slots import BlockKernels, SlotKernels
from moetier.tiers.source import Lease

from .activation import activation_of
from .block import BlockDemand, RoutedTokens, TieredBlock, check_shapes
from .quick import made_once


def slot_kernels_of(module: Any, tiered: TieredBlock) -> BlockKernels | None:
    """Return the kernels for a block's experts in slots; None if it has none, or if its activation is not known."""
    if not isinstance(tiered.kernels, SlotKernels):
        return None
    return made_once(module, tiered, None, partial(_make, module, tiered, tiered.kernels))


def _make(module: Any, tiered: TieredBlock, kernels: SlotKernels) -> BlockKernels | None:
    activation = activation_of(module)
    return None if activation is None else kernels.block(tiered.layout, activation, module.num_experts)


def compute_in_slots(kernels: BlockKernels, tiered: TieredBlock, experts: int, routed: RoutedTokens) -> Tensor:
    """Compute ``experts_forward`` of a block that has so many ``experts``: [tokens, hidden].

    Raises ValueError if shapes do not fit.
    """
    x, index, weights = (tensor.contiguous() for tensor in routed)
    check_shapes(x, index, weights, tiered.layout.projection("down_proj").rows)
    if not (used := _used(index, experts)):
        return torch.zeros_like(x)
    sums = kernels.begin(x, index, weights)
    with closing(BlockDemand(tiered).leases(used)) as arriving:
        for leases in arriving:
            sums.add(_table(leases, experts, x.device))
    return sums.result()


def _used(index: Tensor, experts: int) -> Sequence[int]:
    """Return the experts of ``index`` [tokens, top_k]. Waits for the device once."""
    chosen = index.reshape(-1)
    if len(chosen) <= experts:
        return [expert for expert in dict.fromkeys(chosen.tolist()) if 0 <= expert < experts]
    counts = index.new_zeros(experts + 1).index_add_(0, chosen.clamp(max=experts), torch.ones_like(chosen))
    return [expert for expert, count in enumerate(counts[:-1].tolist()) if count]


def _table(leases: Sequence[Lease[Tensor]], experts: int, device: torch.device) -> Tensor:
    """Return the address of each leased expert's record, else 0: int64 [experts] on the device."""
    addresses = [0] * experts
    for lease in leases:
        addresses[lease.key.expert] = lease.record.data_ptr()
    # from page-locked memory, so that the host does not wait for what was queued before
    host = torch.tensor(addresses, device="cpu", pin_memory=device.type != "cpu")
    return torch.empty_like(host, device=device).copy_(host, non_blocking=True)
