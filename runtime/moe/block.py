"""A block of experts: its leases, the rows of each expert, and the types of its arithmetic.

The exact way to compute a block (``experts.py``) and the quick way (``grouped.py``) share this.
"""

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

_open = threading.local()  # ``source``: of this thread's leases that have not ended in order


@dataclass(frozen=True, slots=True)
class TieredBlock:
    """Attribute ``tiered`` of an Experts module, in place of its parameters."""

    block: int
    layout: RecordLayout
    source: ExpertSource[Tensor]
    kernels: Kernels
    device: torch.device  # of the records
    demanded: Demanded | None = None  # told of a demand, once it is made


def groups(here: TieredBlock, experts: Collection[int]) -> Generator[list[Lease[Tensor]], None, None]:
    """Lease a block's experts; yield together the leases that are valid together.

    Records are uint8 [record bytes].

    ``demanded`` is called at once where all experts are there. Otherwise it is called once those that are there have
    been computed: while the others are read it delays nothing.
    """
    if (cut := getattr(_open, "source", None)) is not None:
        with suppress(MoetierError):  # the source may be closed, or belong to another process
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
    """Return expert -> (tokens, positions in their top-k), in ascending order of experts.

    ``top_k_index`` is [tokens, top_k]; both results are [rows of the expert]. Rows are in the order of eager's, by
    position and then by token. An index of ``experts`` or more means "computed elsewhere" (expert parallelism). Waits
    for the device once.
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
    """Return the types in which the architecture's eager forward multiplies and adds up; no flag tells them.

    Of ``hidden_states`` [tokens, hidden] and ``top_k_weights`` [tokens, top_k] only the types are used.
    """
    match type(module).__name__:
        case "OpenAIPrivacyFilterExperts":
            return torch.float32, torch.float32
        case "Inkling2Experts" | "Inkling2LoopExperts":
            return hidden_states.dtype, torch.float32
        case "NemotronHExperts":
            return hidden_states.dtype, top_k_weights.dtype
        case _:
            return hidden_states.dtype, hidden_states.dtype
