"""What the two ways of computing a block share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetier.runtime.kernels.api import Kernels
from moetier.tiers.errors import MoetierError
from moetier.tiers.layout import ExpertKey, RecordLayout
from moetier.tiers.source import ExpertSource, Lease

Demanded = Callable[[int, Collection[int], bool], None]  # block, experts, whether some of them are still to come

_open = threading.local()  # ``source``: where this thread's leases were acquired from that have not ended in order


@dataclass(frozen=True, slots=True)
class TieredBlock:
    """What an Experts module has in place of its parameters; its attribute ``tiered``."""

    block: int
    layout: RecordLayout
    source: ExpertSource[Tensor]
    kernels: Kernels
    device: torch.device  # of the records
    demanded: Demanded | None = None  # told of a demand, once it is made


def groups(here: TieredBlock, experts: Collection[int]) -> Generator[list[Lease[Tensor]], None, None]:
    """The leases of a block's experts, those together that are valid together. Tells of the demand at once where all
    are there, else as soon as those are computed that are: while the others are read, it delays nothing."""
    if (cut := getattr(_open, "source", None)) is not None:
        with suppress(MoetierError):  # it may be closed, or another process's
            cut.reclaim()
    _open.source = here.source
    left = len(experts)
    tell = here.demanded
    with closing(here.source.acquire([ExpertKey(here.block, expert) for expert in experts])) as leases:
        group = []
        for lease in leases:
            group.append(lease)
            left -= 1
            if lease.more:
                continue
            if tell is not None and left <= 0:
                tell = tell(here.block, experts, False)
            yield group
            group = []
            if tell is not None:
                tell = tell(here.block, experts, True)
    _open.source = None


def rows_of_experts(top_k_index: Tensor, experts: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Expert -> (tokens, positions in their top-k), ascending; rows in eager's order, by position and then by token.

    An index of ``experts`` and more means "computed elsewhere" (expert parallelism). It waits for the device once.
    """
    tokens = len(top_k_index)
    index = top_k_index.T.reshape(-1).clamp(max=experts)  # by position, then by token
    counts = index.new_zeros(experts + 1).index_add_(0, index, torch.ones_like(index))
    order = torch.argsort(index, stable=True)
    positions, by_expert = order // tokens, order % tokens
    rows, start = {}, 0
    for expert, count in enumerate(counts[:-1].tolist()):
        if count:
            rows[expert] = (by_expert[start : start + count], positions[start : start + count])
            start += count
    return rows


def arithmetic(module: Any, hidden_states: Tensor, top_k_weights: Tensor) -> tuple[torch.dtype, torch.dtype]:
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
