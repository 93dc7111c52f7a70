"""The quick way to compute a block: experts that are available together are computed in one call of compiled code.

If all experts of a few tokens are resident, that is in memory, no lease is taken: compiled code looks the records up,
and proves afterwards that none of them was replaced. Otherwise the result is discarded, and experts are leased; those
of many tokens are computed in groups (``grouped.py``). The result is the same bits in each case.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.runtime.kernels.experts.expert_kernels import ExpertKernels, RecordLookup
from moetier.runtime.kernels.experts.expert_products import BATCH_OUTPUTS
from moetier.runtime.kernels.products.api import CPU, FLOATS, Kernels, is_readable
from moetier.runtime.libraries.torch_internals import children_of, hooks_after, hooks_before
from moetier.tiers.layout import RecordLayout

from . import grouped
from .activation import activation_of
from .block import BlockDemand, RoutedTokens, TieredBlock, check_shapes, release_open_leases
from .snapshot import Trials, has_global_hooks

Made = TypeVar("Made")


def _compute_resident_token(
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
        demand.tiered.source.uses.note_discarded(demand.tiered.block, experts)
    return out


def _compute_resident_tokens(
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
        demand.tiered.source.uses.note_discarded(demand.tiered.block, [*counts])
        return None
    out = torch.empty_like(x)
    ordered = torch.tensor([*itertools.chain.from_iterable(order)], device=CPU)
    bounds = torch.arange(0, tokens * k + 1, k, device=CPU)
    kernels.add_up(outputs, weights.reshape(-1)[torch.tensor(by_expert, device=CPU)], ordered, bounds, out)
    return out


def _note_uses(demand: BlockDemand, experts: Sequence[int]) -> None:
    """Note that ``experts`` are demanded, and that all their records are in memory and used without leases."""
    tiered = demand.tiered
    tiered.source.uses.note_found(tiered.block, experts)
    if tiered.remote_compute is not None:
        tiered.remote_compute.note_local(tiered.block, experts)
    demand.announce(experts)


def forward_token(
    module: Any, x: Tensor, experts: Sequence[int], weights: Tensor, residual: Tensor | None
) -> Tensor | None:
    """Compute ``experts_forward`` of one token without gradients, and add the residual if there is one.

    Args:
        module: the Experts module.
        x: [1, hidden] on a CPU.
        experts: [top_k].
        weights: [1, top_k].
        residual: one that ``is_row_like`` x.

    Returns:
        The sum, in the shape of ``residual``, else [1, hidden]; None if the compiled code can't compute these inputs.
    """
    tiered: TieredBlock | None = getattr(module, "tiered", None)
    if tiered is None or tiered.device != x.device or weights.dtype not in FLOATS:
        return None
    kernels = kernels_of(module, tiered, x.dtype)
    if kernels is None or kernels.dtype != x.dtype or x.shape[1] != kernels.width:
        return None
    release_open_leases()
    return _compute_token(kernels, BlockDemand(tiered), x, experts, weights, residual)


def is_row_like(other: Tensor, x: Tensor) -> bool:
    """Return whether compiled code can add ``other``, which a module has returned, to the row x [1, hidden].

    It must have the type and the numbers of x, in any shape [..., 1, hidden] with leading dimensions of 1.
    """
    return is_readable(other) and other.dtype == x.dtype and other.numel() == x.numel() == other.shape[-1]


def kernels_of(module: Any, tiered: TieredBlock, dtype: torch.dtype) -> ExpertKernels | None:
    """Return compiled code for a block's experts, with hidden states of ``dtype``; None if they can't be compiled.

    Without it, experts are computed one after the other (``experts.py``).
    """
    return made_once(module, tiered, dtype, partial(_compile, module, tiered, dtype))


def made_once(
    module: Any, tiered: TieredBlock, dtype: torch.dtype | None, make: Callable[[], Made | None]
) -> Made | None:
    """Return what ``make`` returns for a block, which is made once for each state of the module, and each ``dtype``.

    Returns None if the module's activation has hooks, because compiled code does not call it.
    """
    children = children_of(module).values()
    if any(hooks_after(child) or hooks_before(child) for child in children if child is not None) or has_global_hooks():
        return None
    variant = (dtype, *children)
    if (trials := tiered.compiled.get(variant)) is None:
        trials = tiered.compiled.setdefault(variant, Trials())
    result: Made | None = trials.result(module, make)
    return result


def _compile(module: Any, tiered: TieredBlock, dtype: torch.dtype) -> ExpertKernels | None:
    activation = quick_activation(module, tiered.layout, tiered.kernels)
    if activation is None or tiered.kernels.processor is None:
        return None
    computed = dtype if dtype in FLOATS else torch.float32
    return ExpertKernels(tiered.layout, activation, computed, module.num_experts, tiered.kernels.processor)


def quick_activation(module: Any, layout: RecordLayout, kernels: Kernels) -> Activation | None:
    """Return the activation with which a block's experts are computed in the quick way; None if they can't be."""
    activation = activation_of(module) if kernels.processor is not None else None
    return activation if activation is not None and ExpertKernels.can_compile(layout, activation) else None


def compute_quick(
    kernels: ExpertKernels,
    tiered: TieredBlock,
    calls: Sequence[RoutedTokens],
    between: Callable[[], object] = lambda: None,
) -> Iterator[Tensor]:
    """Compute ``experts_forward`` with compiled code for several calls together, and yield [tokens, hidden] of each.

    An expert is leased once for all of them. ``between`` is called when no expert is leased. Callers may remove the
    inputs from ``calls`` before they take the results.
    """
    dtype, sizes = calls[0].x.dtype, [len(call.x) for call in calls]
    sums = _compute_calls(kernels, BlockDemand(tiered), [_converted(kernels, *call) for call in calls], between)
    for out in torch.split(sums, sizes):
        yield out.to(dtype)


def _converted(kernels: ExpertKernels, x: Tensor, top_k_index: Tensor, weights: Tensor) -> RoutedTokens:
    """Return x [tokens, hidden], with indices and weights [tokens, top_k], in types that compiled code takes.

    Raises ValueError if shapes do not fit.
    """
    check_shapes(x, top_k_index, weights, kernels.width)
    weights = weights if weights.dtype in FLOATS else weights.float()
    return RoutedTokens(x.to(kernels.dtype).contiguous(), top_k_index, weights.contiguous())


def _compute_calls(
    kernels: ExpertKernels, demand: BlockDemand, calls: Sequence[RoutedTokens], between: Callable[[], object]
) -> Tensor:
    """Compute the tokens of all calls. Return their sums [tokens, hidden]."""
    if len(calls) == 1:
        x, index, weights = calls[0]
        out: Tensor | None = None
        if len(x) == 1:
            out = _compute_token(kernels, demand, x, index.tolist()[0], weights)
        if out is None and index.numel() <= BATCH_OUTPUTS and demand.tiered.remote_compute is None:
            out = _compute_resident_tokens(kernels, demand, x, index, weights)
        if out is not None:
            return out
    return grouped.compute_tokens(kernels, demand, calls, between)


def _compute_token(
    kernels: ExpertKernels,
    demand: BlockDemand,
    x: Tensor,
    experts: Sequence[int],
    weights: Tensor,
    residual: Tensor | None = None,
) -> Tensor | None:
    """Compute a single token, x [1, hidden], and add ``residual`` if there is one.

    Returns [1, hidden], or the shape of ``residual``; None if the router names an expert twice, or an expert that the
    block does not have.
    """
    if not experts or len(set(experts)) < len(experts):
        return None
    if (out := _compute_resident_token(kernels, demand, x, experts, weights, residual)) is not None:
        return out
    if max(experts) >= kernels.experts or min(experts) < 0:
        return None
    out = grouped.compute_leased_token(kernels, demand, x, experts, weights)
    return out if residual is None else residual + out
