"""The quick way to compute a block: experts that are available together are computed in one call of compiled code.

If all experts of a single token are resident, it takes no lease: compiled code looks the records up, and proves
afterwards that none of them was replaced. The result does not depend on which experts are available together.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.runtime.kernels.experts.expert_kernels import ExpertKernels
from moetier.runtime.kernels.experts.expert_products import BATCH_OUTPUTS
from moetier.runtime.kernels.products.api import CPU, FLOATS, Kernels, is_readable
from moetier.runtime.libraries.torch_internals import children_of, hooks_after, hooks_before
from moetier.tiers.layout import RecordLayout
from moetier.tiers.source import Lease

from .activation import activation_of
from .block import TieredBlock, TokensOfExperts, arriving_leases, end_open_leases, tokens_of_experts
from .snapshot import Trials, has_global_hooks


def one_token(
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
    end_open_leases()
    return _one_token(kernels, tiered, x, experts, weights, residual)


def is_row_like(other: Tensor, x: Tensor) -> bool:
    """Return whether compiled code can add ``other``, which a module has returned, to a row of the type of x [1, K].

    It must be [1, K] too. It may have more leading dimensions.
    """
    return is_readable(other) and other.dtype == x.dtype and other.numel() == x.numel() == other.shape[-1]


def kernels_of(module: Any, tiered: TieredBlock, dtype: torch.dtype) -> ExpertKernels | None:
    """Return compiled code for a block's experts, with hidden states of ``dtype``; None if they can't be compiled.

    Without it, experts are computed one after the other (``experts.py``).
    """
    parts = children_of(module).values()
    if any(hooks_after(part) or hooks_before(part) for part in parts if part is not None) or has_global_hooks():
        return None  # compiled code does not call the activation, and so none of its hooks
    variant = (dtype, *parts)
    if (trials := tiered.compiled.get(variant)) is None:
        trials = tiered.compiled.setdefault(variant, Trials())
    return trials.result(module, partial(_compile, module, tiered, dtype))


def _compile(module: Any, tiered: TieredBlock, dtype: torch.dtype) -> ExpertKernels | None:
    activation = quick_activation(module, tiered.layout, tiered.kernels)
    if activation is None or tiered.kernels.processor is None:
        return None
    computed = dtype if dtype in FLOATS else torch.float32
    return ExpertKernels(tiered.layout, activation, computed, module.num_experts, tiered.kernels.processor)


def quick_activation(module: Any, layout: RecordLayout, kernels: Kernels) -> Activation | None:
    """Return the activation with which a block's experts are computed in the quick way; None if they can't be."""
    activation = activation_of(module) if kernels.processor is not None else None
    return activation if activation is not None and ExpertKernels.fit(layout, activation) else None


def compute_grouped(
    kernels: ExpertKernels, tiered: TieredBlock, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute ``experts_forward`` with compiled code, all experts that are available in one call.

    [tokens, hidden] -> [tokens, hidden].
    """
    shape = top_k_index.shape
    if hidden_states.shape != (shape[0], kernels.width) or top_k_weights.shape != shape:
        given = f"{[*hidden_states.shape]}, {[*shape]} and {[*top_k_weights.shape]}"
        raise ValueError(f"hidden states, experts and weights of shapes {given}, where hidden is {kernels.width}")
    weights = top_k_weights if top_k_weights.dtype in FLOATS else top_k_weights.float()
    x, weights = hidden_states.to(kernels.dtype).contiguous(), weights.contiguous()
    out = _one_token(kernels, tiered, x, top_k_index.tolist()[0], weights) if len(x) == 1 else None
    return (_tokens(kernels, tiered, x, top_k_index, weights) if out is None else out).to(hidden_states.dtype)


def _one_token(
    kernels: ExpertKernels,
    tiered: TieredBlock,
    x: Tensor,
    experts: Sequence[int],
    weights: Tensor,
    residual: Tensor | None = None,
) -> Tensor | None:
    """Compute a single token, x [1, hidden], and add ``residual`` if there is one.

    If all experts are resident, they are found and used without a lease. Returns [1, hidden], or the shape of
    ``residual``; None if the router names an expert twice, or an expert that the block does not have.
    """
    if not experts or len(set(experts)) < len(experts):
        return None
    residents = tiered.source.residents(tiered.block)
    token = kernels.one_token(len(experts), weights.dtype, has_residual=residual is not None)
    if residents is not None and token.find(experts, residents):
        tiered.source.note_uses(tiered.block, experts)
        if tiered.remote_compute is not None:
            tiered.remote_compute.note_uses(tiered.block, experts)
        if tiered.on_demand is not None:
            tiered.on_demand(tiered.block, experts)
        if (out := token.compute(x, weights, residual)) is not None:
            return out
        tiered.source.take_back_uses(tiered.block, experts)
        tiered = replace(tiered, on_demand=None)  # it was called already
    if max(experts) >= kernels.experts or min(experts) < 0:
        return None
    places = {expert: place for place, expert in enumerate(experts)}
    outputs = torch.empty(len(experts), x.shape[1], dtype=x.dtype, device=CPU)

    def compute(leases: Sequence[Lease[Tensor]]) -> None:
        jobs = [number for row, lease in enumerate(leases) for number in (lease.record.data_ptr(), row, 1)]
        at = array("q", [places[lease.key.expert] for lease in leases])
        kernels.compute(x, array("q", jobs), at, outputs)

    def placed() -> TokensOfExperts:
        return {expert: ([0], [place]) for expert, place in places.items()}

    _experts(kernels, tiered, x, places, placed, compute, outputs)
    out = kernels.add_up(outputs, weights)
    return out if residual is None else residual + out


def _tokens(kernels: ExpertKernels, tiered: TieredBlock, x: Tensor, top_k_index: Tensor, weights: Tensor) -> Tensor:
    """Compute several tokens, x [tokens, hidden]. An expert is leased once for all tokens that use it."""
    tokens, k = top_k_index.shape
    tokens_of = tokens_of_experts(top_k_index, kernels.experts)
    outputs = x.new_zeros(tokens * k, x.shape[1])

    def compute(leases: Sequence[Lease[Tensor]]) -> None:
        for batch in _batches(leases, tokens_of):
            jobs, first = array("q"), 0
            for lease, token, _ in batch:
                jobs.extend((lease.record.data_ptr(), first, len(token)))
                first += len(token)
            gathered = torch.cat([token for _, token, _ in batch])
            places = gathered * k + torch.cat([position for _, _, position in batch])
            kernels.compute(x.index_select(0, gathered), jobs, array("q", places.tolist()), outputs)

    def placed() -> TokensOfExperts:
        return {expert: (own.tolist(), (own * k + position).tolist()) for expert, (own, position) in tokens_of.items()}

    _experts(kernels, tiered, x, tokens_of, placed, compute, outputs)
    return kernels.add_up(outputs, weights)


def _experts(
    kernels: ExpertKernels,
    tiered: TieredBlock,
    x: Tensor,
    experts: Collection[int],
    tokens_of: Callable[[], TokensOfExperts],
    compute: Callable[[Sequence[Lease[Tensor]]], None],
    outputs: Tensor,
) -> None:
    """Compute all ``experts`` of x [tokens, hidden], some of them on other hosts, and fill their places in ``outputs``.

    ``compute`` computes experts that are leased together. ``tokens_of`` returns what each expert computes.
    """
    left = experts
    if tiered.remote_compute is not None:
        with closing(tiered.remote_compute.send(kernels, tiered.block, x.data_ptr(), len(x), tokens_of())) as sent:
            if sent.experts and tiered.on_demand is not None:
                tiered.on_demand(tiered.block, experts)
                tiered = replace(tiered, on_demand=None)
            _arriving(tiered, [expert for expert in experts if expert not in sent.experts], compute)
            left = sent.collect(outputs.data_ptr())
    _arriving(tiered, left, compute)


def _arriving(
    tiered: TieredBlock, experts: Collection[int], compute: Callable[[Sequence[Lease[Tensor]]], None]
) -> None:
    """Call ``compute`` with the leases of experts that are available together, until all were computed."""
    if not experts:
        return
    with closing(arriving_leases(tiered, experts)) as arriving:
        for leases in arriving:
            compute(leases)
            for lease in leases:
                lease.validate()  # if the record was replaced, the expert is leased and computed again


Batch = list[tuple[Lease[Tensor], Tensor, Tensor]]  # (lease, tokens that use it, their positions in the top-k)


def _batches(leases: Sequence[Lease[Tensor]], tokens_of: dict[int, tuple[Tensor, Tensor]]) -> Iterator[Batch]:
    """Divide the tokens of leased experts into batches of at most BATCH_OUTPUTS outputs."""
    batch: Batch = []
    left = BATCH_OUTPUTS
    for lease in leases:
        for tokens, positions in zip(
            *(torch.split(index, BATCH_OUTPUTS) for index in tokens_of[lease.key.expert]), strict=True
        ):
            if batch and len(tokens) > left:
                yield batch
                batch, left = [], BATCH_OUTPUTS
            batch.append((lease, tokens, positions))
            left -= len(tokens)
    yield batch
