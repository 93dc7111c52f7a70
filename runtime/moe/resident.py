"""Tokens whose experts are all in memory, computed without leases.

Compiled code looks the records up, and proves afterwards that none of them was replaced. Otherwise the result is
discarded, and the caller leases the experts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from moetier.runtime.kernels.experts.expert_kernels import ExpertKernels, RecordLookup
from moetier.runtime.kernels.products.api import CPU

from .block import BlockDemand


def compute_token(
    kernels: ExpertKernels,
    demand: BlockDemand,
    x: Tensor,
    experts: Sequence[int],
    weights: Tensor,
    residual: Tensor | None,
) -> Tensor | None:
    """Compute a token, x [1, hidden] with weights [1, top_k], and add ``residual`` if there is one.

    ``experts`` are distinct. Returns [1, hidden], or the shape of ``residual``; None if an expert is not resident, or
    was replaced meanwhile.
    """
    residents = demand.tiered.source.residents(demand.tiered.block)
    token = kernels.one_token(len(experts), weights.dtype, has_residual=residual is not None)
    if residents is None or not token.find(experts, residents):
        return None
    _note_uses(demand, experts)
    if (out := token.compute(x, weights, residual)) is None:
        demand.tiered.source.uses.take_back(demand.tiered.block, experts)
    return out


def compute_tokens(
    kernels: ExpertKernels, demand: BlockDemand, x: Tensor, index: Tensor, weights: Tensor
) -> Tensor | None:
    """Compute a few tokens, x [tokens, hidden], with ``index`` and ``weights`` [tokens, top_k].

    The numbers of outputs are sorted in Python, which takes less time than calling torch as often. Returns
    [tokens, hidden]; None if an expert is not resident, or was replaced meanwhile.
    """
    if (residents := demand.tiered.source.residents(demand.tiered.block)) is None:
        return None
    tokens, k = index.shape
    chosen = index.reshape(-1).tolist()
    by_expert = sorted(range(tokens * k), key=chosen.__getitem__)  # places of outputs, by expert and then by token
    counts = Counter(chosen[place] for place in by_expert)  # ascending by expert
    lookup = RecordLookup(kernels, len(counts))
    if not counts or not lookup.find([*counts], residents):
        return None
    _note_uses(demand, [*counts])
    rows, order = [place // k for place in by_expert], list[list[int]]([] for _ in range(tokens))
    for output, token in enumerate(rows):
        order[token].append(output)
    outputs = x.new_empty((len(rows), kernels.width))
    of_outputs = x.index_select(0, torch.tensor(rows, device=CPU))
    if not kernels.compute_found(of_outputs, lookup, [*counts.values()], outputs):
        demand.tiered.source.uses.take_back(demand.tiered.block, [*counts])
        return None
    out = torch.empty_like(x)
    ordered = torch.tensor([*itertools.chain.from_iterable(order)], device=CPU)
    bounds = torch.arange(0, tokens * k + 1, k, device=CPU)
    kernels.add_up(outputs, weights.reshape(-1)[torch.tensor(by_expert, device=CPU)], ordered, bounds, out)
    return out


def _note_uses(demand: BlockDemand, experts: Sequence[int]) -> None:
    """Note that ``experts`` are demanded, and that all their records are in memory and used without leases."""
    tiered = demand.tiered
    tiered.source.uses.note(tiered.block, experts)
    if tiered.remote_compute is not None:
        tiered.remote_compute.note_local(tiered.block, experts)
    demand.note(experts)
