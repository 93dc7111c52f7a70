"""The quick way to compute a block: experts that are available together are computed in one call of compiled code.

If all experts of a few tokens are resident, it takes no lease: compiled code looks the records up, and proves
afterwards that none of them was replaced. The result does not depend on which experts are available together.

Experts of many tokens are computed in groups, in ascending order, and each group's outputs are added to the tokens'
sums. So each expert is leased once for all tokens of a prompt, and the memory for outputs is that of one group.
A long prompt needs nearly all experts, of which memory keeps those of its last tokens.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.runtime.kernels.experts.expert_kernels import ExpertKernels, RecordLookup
from moetier.runtime.kernels.experts.expert_products import BATCH_OUTPUTS
from moetier.runtime.kernels.products.api import CPU, FLOATS, Kernels, is_readable
from moetier.runtime.libraries.torch_internals import children_of, hooks_after, hooks_before
from moetier.tiers.layout import ExpertKey, RecordLayout
from moetier.tiers.source import Lease

from .activation import activation_of
from .block import TieredBlock, TokensOfExperts, arriving_leases, end_open_leases
from .snapshot import Trials, has_global_hooks

READ_AHEAD = 6  # experts that are read before their group is computed
RECENT = 48  # last tokens of a prompt, whose experts stay in memory: the next tokens need many of the same
GROUP_OUTPUTS = 2048  # most outputs of a group of experts: [GROUP_OUTPUTS, hidden] numbers, and as many inputs


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
    return activation if activation is not None and ExpertKernels.can_compile(layout, activation) else None


class Routed(NamedTuple):
    """Tokens, and the experts that compute them."""

    x: Tensor  # [tokens, hidden]
    top_k_index: Tensor  # [tokens, top_k]
    weights: Tensor  # [tokens, top_k]


def compute_grouped(
    kernels: ExpertKernels, tiered: TieredBlock, parts: Sequence[Routed], between: Callable[[], object] = lambda: None
) -> Iterator[Tensor]:
    """Compute ``experts_forward`` with compiled code for several calls together, and yield [tokens, hidden] of each.

    An expert is leased once for all of them. ``between`` is called when no expert is leased.
    """
    given = [_checked(kernels, *part) for part in parts]
    (x, index, weights), dtype = given[0], parts[0].x.dtype
    if len(parts) == len(x) == 1 and (out := _one_token(kernels, tiered, x, index.tolist()[0], weights)) is not None:
        yield out.to(dtype)
        return
    few = index.numel() <= BATCH_OUTPUTS and len(parts) == 1 and tiered.remote_compute is None
    if few and (out := _few_tokens(kernels, tiered, x, index, weights)) is not None:
        yield out.to(dtype)
        return
    sums, sizes = _tokens(kernels, tiered, given, between), [len(part.x) for part in given]
    del given, x, index, weights  # callers may free the inputs before they take the results
    for part in torch.split(sums, sizes):
        yield part.to(dtype)


def _checked(kernels: ExpertKernels, x: Tensor, top_k_index: Tensor, weights: Tensor) -> Routed:
    """Return tokens in the type that compiled code takes. Raises ValueError if shapes do not fit."""
    shape = top_k_index.shape
    if x.shape != (shape[0], kernels.width) or weights.shape != shape:
        given = f"{[*x.shape]}, {[*shape]} and {[*weights.shape]}"
        raise ValueError(f"hidden states, experts and weights of shapes {given}, where hidden is {kernels.width}")
    weights = weights if weights.dtype in FLOATS else weights.float()
    return Routed(x.to(kernels.dtype).contiguous(), top_k_index, weights.contiguous())


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
        _note_uses(tiered, experts)
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
    order, bounds = (
        torch.tensor(numbers, device=CPU)
        for numbers in (sorted(range(len(experts)), key=experts.__getitem__), (0, len(experts)))
    )
    out = torch.empty_like(x)
    kernels.add_up(outputs, weights.reshape(-1), order, bounds, out)
    return out if residual is None else residual + out


def _few_tokens(
    kernels: ExpertKernels, tiered: TieredBlock, x: Tensor, index: Tensor, weights: Tensor
) -> Tensor | None:
    """Compute a few tokens, x [tokens, hidden], whose experts are all resident, without leases.

    The numbers of outputs are sorted in Python, which takes less time than calling torch as often. Returns None if an
    expert is not resident.
    """
    if (residents := tiered.source.residents(tiered.block)) is None:
        return None
    tokens, k = index.shape
    chosen = index.reshape(-1).tolist()
    by_expert = sorted(range(tokens * k), key=chosen.__getitem__)  # places of outputs, by expert and then by token
    counts = Counter(chosen[place] for place in by_expert)  # ascending by expert
    lookup = RecordLookup(kernels, len(counts))
    if not counts or not lookup.find([*counts], residents):
        return None
    _note_uses(tiered, [*counts])
    rows, order = [place // k for place in by_expert], list[list[int]]([] for _ in range(tokens))
    for output, token in enumerate(rows):
        order[token].append(output)
    outputs = x.new_empty((len(rows), kernels.width))
    of_outputs = x.index_select(0, torch.tensor(rows, device=CPU))
    if not kernels.compute_found(of_outputs, lookup, [*counts.values()], outputs):
        tiered.source.take_back_uses(tiered.block, [*counts])
        # it was called already
        return _tokens(kernels, replace(tiered, on_demand=None), [Routed(x, index, weights)], lambda: None)
    out = torch.empty_like(x)
    ordered = torch.tensor([*itertools.chain.from_iterable(order)], device=CPU)
    bounds = torch.arange(0, tokens * k + 1, k, device=CPU)
    kernels.add_up(outputs, weights.reshape(-1)[torch.tensor(by_expert, device=CPU)], ordered, bounds, out)
    return out


def _note_uses(tiered: TieredBlock, experts: Sequence[int]) -> None:
    """Note that ``experts`` are demanded, and that all their records are in memory and used without leases."""
    tiered.source.note_uses(tiered.block, experts)
    if tiered.remote_compute is not None:
        tiered.remote_compute.note_uses(tiered.block, experts)
    if tiered.on_demand is not None:
        tiered.on_demand(tiered.block, experts)


def _tokens(
    kernels: ExpertKernels, tiered: TieredBlock, parts: Sequence[Routed], between: Callable[[], object]
) -> Tensor:
    """Compute the tokens of all parts. Return their sums [tokens, hidden], in fp32 if there were several groups."""
    index, weights = (torch.cat([part[number] for part in parts]) for number in (1, 2))
    tokens, k = index.shape
    experts = index.reshape(-1).clamp(max=kernels.experts)
    by_expert = torch.argsort(experts, stable=True)  # places of all outputs in ``index``, by expert and then by token
    counts = torch.bincount(experts, minlength=kernels.experts + 1)[:-1]
    groups = _groups(counts.tolist())
    is_part = len(groups) > 1
    if is_part:
        sums = torch.zeros((tokens, kernels.width), device=CPU)
    else:  # without a group no expert computes anything
        sums = (parts[0].x.new_empty if groups else parts[0].x.new_zeros)((tokens, kernels.width))
    experts_used = counts.nonzero()[:, 0].tolist()
    recent = {*index[-RECENT:].flatten().tolist()} if is_part else set[int]()
    on_demand, wanted = tiered.on_demand, len(experts_used) if is_part else 0
    if is_part:
        tiered = replace(tiered, on_demand=None)
    buffer = parts[0].x.new_empty((max((group[-1].end - group[0].begin for group in groups), default=0), kernels.width))
    for number, group in enumerate(groups):
        if is_part:
            _read_ahead(tiered, experts_used, group)
        begin, end = group[0].begin, group[-1].end
        places = by_expert[begin:end]
        own = places.div(k, rounding_mode="floor")
        computed, rows = torch.unique(own, return_inverse=True)
        outputs, spans = buffer[: end - begin], [Span(e, b - begin, c - begin) for e, b, c in group]
        _group(kernels, tiered, _rows(parts, computed), spans, rows, outputs, wanted)
        if is_part and on_demand is not None and not number:
            on_demand(tiered.block, experts_used)
        bounds = torch.zeros(tokens + 1, dtype=torch.int64, device=CPU)
        torch.cumsum(torch.bincount(own, minlength=tokens), 0, out=bounds[1:])
        order = torch.argsort(rows, stable=True)  # by token, and then by expert
        kernels.add_up(outputs, weights.reshape(-1)[places], order, bounds, sums, is_part=is_part)
        if kept := [span.expert for span in group if span.expert in recent]:
            tiered.source.touch(tiered.block, kept)  # else the next experts of the prompt would evict them
        between()
    if is_part:
        tiered.source.prefetch(tiered.block, ())
    return sums


class Span(NamedTuple):
    """Outputs of one expert: ``begin`` to ``end`` of all outputs, which are in ascending order of experts."""

    expert: int
    begin: int
    end: int


def _groups(counts: Sequence[int]) -> list[list[Span]]:
    """Divide the outputs of all experts, ``counts`` of each, into groups of at most GROUP_OUTPUTS."""
    groups, left, begin = list[list[Span]](), 0, 0
    for expert, count in enumerate(counts):
        for first in range(begin, begin + count, GROUP_OUTPUTS):
            span = Span(expert, first, min(first + GROUP_OUTPUTS, begin + count))
            if span.end - span.begin > left:
                groups.append([])
                left = GROUP_OUTPUTS
            groups[-1].append(span)
            left -= span.end - span.begin
        begin += count
    return groups


def _read_ahead(tiered: TieredBlock, used: Sequence[int], group: Sequence[Span]) -> None:
    """Let the experts after a group be read while it is computed. ``used``: all experts, ascending."""
    first = bisect_left(used, group[0].expert)
    end = bisect_left(used, group[-1].expert) + 1
    ahead = [ExpertKey(tiered.block, expert) for expert in used[first : end + READ_AHEAD]]
    if tiered.source.absent(ahead):
        tiered.source.prefetch(tiered.block, ahead)


def _rows(parts: Sequence[Routed], tokens: Tensor) -> Tensor:
    """Return the hidden states of ``tokens``, ascending numbers [n] among those of all parts: [n, hidden]."""
    ends = torch.tensor([len(part.x) for part in parts], device=CPU).cumsum(0)
    numbers = torch.bincount(torch.bucketize(tokens, ends, right=True), minlength=len(parts)).tolist()
    starts = [0, *ends.tolist()]
    chosen = zip(parts, torch.split(tokens, numbers), starts, strict=False)
    return torch.cat([part.x.index_select(0, own - start) for part, own, start in chosen if len(own)])


def _group(
    kernels: ExpertKernels,
    tiered: TieredBlock,
    x: Tensor,
    spans: Sequence[Span],
    rows: Tensor,
    outputs: Tensor,
    wanted: int,
) -> None:
    """Compute a group of experts.

    Args:
        kernels: compiled code.
        tiered: the block.
        x: [tokens, hidden].
        spans: outputs of each expert.
        rows: [R], the row of x for each output.
        outputs: [R, hidden].
        wanted: as in ``ExpertSource.acquire``.
    """
    span_of = {span[0]: span for span in spans}

    def compute(leases: Sequence[Lease[Tensor]]) -> None:
        for batch in _batches(leases, span_of):
            jobs, first = array("q"), 0
            for lease, begin, end in batch:
                jobs.extend((lease.record.data_ptr(), first, end - begin))
                first += end - begin
            gathered = torch.cat([rows[begin:end] for _, begin, end in batch])
            places = array("q", (place for _, begin, end in batch for place in range(begin, end)))
            kernels.compute(x.index_select(0, gathered), jobs, places, outputs)

    def placed() -> TokensOfExperts:
        return {expert: (rows[begin:end].tolist(), range(begin, end)) for expert, begin, end in spans}

    _experts(kernels, tiered, x, span_of, placed, compute, outputs, wanted)


def _experts(
    kernels: ExpertKernels,
    tiered: TieredBlock,
    x: Tensor,
    experts: Collection[int],
    tokens_of: Callable[[], TokensOfExperts],
    compute: Callable[[Sequence[Lease[Tensor]]], None],
    outputs: Tensor,
    wanted: int = 0,
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
            _arriving(tiered, [expert for expert in experts if expert not in sent.experts], compute, wanted)
            left = sent.collect(outputs.data_ptr())
    _arriving(tiered, left, compute, wanted)


def _arriving(
    tiered: TieredBlock, experts: Collection[int], compute: Callable[[Sequence[Lease[Tensor]]], None], wanted: int
) -> None:
    """Call ``compute`` with the leases of experts that are available together, until all were computed."""
    if not experts:
        return
    with closing(arriving_leases(tiered, experts, wanted)) as arriving:
        for leases in arriving:
            compute(leases)
            for lease in leases:
                lease.validate()  # if the record was replaced, the expert is leased and computed again


Batch = list[tuple[Lease[Tensor], int, int]]  # (lease, where its outputs begin and end)


def _batches(leases: Sequence[Lease[Tensor]], spans: Mapping[int, Span]) -> Iterator[Batch]:
    """Divide the outputs of leased experts into batches of at most BATCH_OUTPUTS."""
    batch: Batch = []
    left = BATCH_OUTPUTS
    for lease in leases:
        _, begin, end = spans[lease.key.expert]
        for first in range(begin, end, BATCH_OUTPUTS):
            last = min(first + BATCH_OUTPUTS, end)
            if batch and last - first > left:
                yield batch
                batch, left = [], BATCH_OUTPUTS
            batch.append((lease, first, last))
            left -= last - first
    yield batch
