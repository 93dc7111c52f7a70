"""An Experts module, its twin without parameters, and a source of the twin's records."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from architectures import tiny_model
from torch import Tensor

from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.moe.block import TieredBlock
from moetier.runtime.moe.experts import EXPERT_PARAMETERS, experts_modules
from moetier.tiers.layout import Bits, ExpertKey, RecordLayout
from moetier.tiers.quant.codec import encode, layout_for
from moetier.tiers.source import Lease, NoUses
from moetier.tiers.stats import TierCounters, TierStats

BLOCK = 5
CPU = torch.device("cpu")


class OneSlot:
    """An ExpertSource with a single slot, which the next record overwrites: what is kept of a lease is lost."""

    def __init__(self, records: Sequence[Tensor], order: Callable[[list[int]], Iterable[int]]) -> None:
        self.uses = NoUses()
        self.records = records
        self.order = order
        self.slot = torch.zeros_like(records[0])
        self.demands: list[list[ExpertKey]] = []
        self.open = 0  # iterators that were neither exhausted nor closed

    def acquire(self, keys: Sequence[ExpertKey], of_total: int = 0) -> Generator[Lease[Tensor], None, None]:
        self.demands.append(list(keys))
        self.open += 1
        try:
            for expert in self.order([key.expert for key in keys]):
                self.slot.copy_(self.records[expert])
                yield Lease(ExpertKey(BLOCK, expert), self.slot, 0)
                self.slot.fill_(0xA5)
        finally:
            self.open -= 1

    def residents(self, block: int) -> None:
        return None

    def release_leases(self) -> None:
        """Nothing is kept of who acquired."""

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        raise NotImplementedError

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        raise AssertionError("no prefetch is requested")

    def stats(self) -> TierStats:
        return TierCounters("one slot").snapshot(slots=1, ready=0, leased=0, memory_bytes=len(self.slot))

    def close(self) -> None:
        pass


def records_of(module: Any, bits: Bits) -> tuple[RecordLayout, list[Tensor]]:
    parameters = {name: p for name, p in module.named_parameters(recurse=False) if name in EXPERT_PARAMETERS}
    shapes = {name: (tuple(p.shape[1:]), str(p.dtype).removeprefix("torch.")) for name, p in parameters.items()}
    layout = layout_for(shapes, bits=bits, transposed=module.is_transposed)
    records = []
    for expert in range(module.num_experts):
        record = np.zeros(layout.record_bytes, np.uint8)
        encode({name: p[expert].detach() for name, p in parameters.items()}, layout, record, fast=True)
        records.append(torch.from_numpy(record))
    return layout, records


def pair(
    model_type: str,
    dtype: torch.dtype,
    *,
    bits: Bits = 16,
    order: Callable[[list[int]], Iterable[int]] = lambda experts: experts,
) -> tuple[Any, Any, OneSlot]:
    """The first Experts module of a tiny model, its twin without parameters, and the source of the twin."""
    ordinary = next(iter(experts_modules(tiny_model(model_type, dtype)).values()))
    layout, records = records_of(ordinary, bits)
    twin = copy.deepcopy(ordinary)
    for name in EXPERT_PARAMETERS:
        twin._parameters.pop(name, None)
    source = OneSlot(records, order)
    twin.tiered = TieredBlock(BLOCK, layout, source, Kernels(CPU), CPU)
    return ordinary, twin, source


def inputs(module: Any, dtype: torch.dtype, *, tokens: int = 13, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    index = torch.rand(tokens, module.num_experts, generator=random).topk(3).indices
    return torch.randn(tokens, width, generator=random).to(dtype), index, torch.rand(tokens, 3, generator=random)
