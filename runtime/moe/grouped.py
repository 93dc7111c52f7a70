"""Experts that are leased, and computed with compiled code as they arrive.

Experts of many tokens are computed in groups, in ascending order, and each group's outputs are added to the tokens'
sums. So each expert is leased once for all tokens of a prompt, and the memory for outputs is that of one group.
A long prompt uses nearly all experts. Those of its last tokens stay in memory, as the next tokens need them. The next
block's experts are read while the layers before it are computed.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from typing import NamedTuple

import torch
from torch import Tensor

from moetier.runtime.kernels.experts.expert_kernels import ExpertKernels
from moetier.runtime.kernels.experts.expert_products import BATCH_OUTPUTS
from moetier.runtime.kernels.products.api import CPU
from moetier.tiers.errors import MoetierError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import Lease

from .block import BlockDemand, RoutedTokens, TieredBlock, TokensOfExperts

READ_AHEAD = 6  # experts that are read before their group is computed
NEARLY_ALL = 0.9  # if a prompt uses this share of a block's experts, those of the next block are read ahead
RECENT = 48  # last tokens of a prompt, whose experts stay in memory: the next tokens need many of the same
GROUP_OUTPUTS = 2048  # most outputs of a group of experts: [GROUP_OUTPUTS, hidden] numbers, and as many inputs


class DemandPart(NamedTuple):
    """The outputs of some experts of a demand, which are computed together."""

    x: Tensor  # [tokens, hidden]
    experts: Collection[int]
    tokens_of: Callable[[], TokensOfExperts]  # returns what each expert computes
    compute: Callable[[Sequence[Lease[Tensor]]], None]  # computes experts that are leased together
    outputs: Tensor  # [outputs, hidden], to be filled


def compute_leased_token(
    kernels: ExpertKernels, demand: BlockDemand, x: Tensor, experts: Sequence[int], weights: Tensor
) -> Tensor:
    """Compute a token, x [1, hidden] with weights [1, top_k] of distinct ``experts``. Returns [1, hidden]."""
    places = {expert: place for place, expert in enumerate(experts)}
    outputs = torch.empty(len(experts), x.shape[1], dtype=x.dtype, device=CPU)

    def compute(leases: Sequence[Lease[Tensor]]) -> None:
        jobs = [number for row, lease in enumerate(leases) for number in (lease.record.data_ptr(), row, 1)]
        at = array("q", [places[lease.key.expert] for lease in leases])
        kernels.compute(x, array("q", jobs), at, outputs)

    def tokens_of() -> TokensOfExperts:
        return {expert: ([0], [place]) for expert, place in places.items()}

    _compute(kernels, demand, DemandPart(x, places, tokens_of, compute, outputs))
    order = torch.tensor(sorted(range(len(experts)), key=experts.__getitem__), device=CPU)
    out = torch.empty_like(x)
    kernels.add_up(outputs, weights.reshape(-1), order, torch.tensor((0, len(experts)), device=CPU), out)
    return out


def compute_tokens(
    kernels: ExpertKernels, demand: BlockDemand, calls: Sequence[RoutedTokens], between: Callable[[], object]
) -> Tensor:
    """Compute the tokens of all calls together. Return their sums [tokens, hidden].

    The sums are fp32 if there are several groups of experts. ``between`` is called after each group, while no expert is
    leased.
    """
    outputs = Outputs.of(calls, kernels.experts)
    groups = _groups(outputs.counts)
    if len(groups) > 1:
        return _compute_groups(kernels, demand, outputs, groups, between)
    x, shape = calls[0].x, (outputs.tokens, kernels.width)
    if not groups:  # no expert computes anything
        return x.new_zeros(shape)
    sums = x.new_empty(shape)
    _add_group(kernels, demand, outputs, groups[0], sums, x.new_empty((outputs.total, kernels.width)))
    between()
    return sums


def _compute_groups(
    kernels: ExpertKernels,
    demand: BlockDemand,
    outputs: Outputs,
    groups: Sequence[Sequence[Span]],
    between: Callable[[], object],
) -> Tensor:
    """Compute several groups of experts of a long prompt. Return fp32 sums [tokens, hidden]."""
    tiered = demand.tiered
    sums = torch.zeros((outputs.tokens, kernels.width), device=CPU)
    buffer = outputs.calls[0].x.new_empty((max(group[-1].end - group[0].begin for group in groups), kernels.width))
    used, recent = outputs.used(), outputs.recent()
    try:
        for group in groups:
            _read_ahead(tiered, used, group)
            _add_group(kernels, demand, outputs, group, sums, buffer)
            demand.announce(used)  # only now, so that the reads of the first group go first
            if kept := [span.expert for span in group if span.expert in recent]:
                tiered.source.uses.touch(tiered.block, kept)  # else the next experts of the prompt would evict them
            between()
    finally:
        with suppress(MoetierError):  # the source may be closed
            tiered.source.prefetch(tiered.block, ())
    if tiered.remote_compute is None and len(used) >= NEARLY_ALL * len(outputs.counts):
        tiered.request_following()
    return sums


class Outputs(NamedTuple):
    """The outputs of all experts for the tokens of some calls, before they are computed.

    They are in ascending order of experts, those of one expert in ascending order of tokens.
    """

    calls: Sequence[RoutedTokens]
    top_k_index: Tensor  # [tokens, top_k] of all calls
    weights: Tensor  # [tokens * top_k]
    places: Tensor  # for each output, its place in ``weights``
    counts: list[int]  # for each expert, its number of outputs

    @classmethod
    def of(cls, calls: Sequence[RoutedTokens], experts: int) -> Outputs:
        """Sort the outputs of a block that has so many experts. Those of other experts come last, and are ignored."""
        index = torch.cat([call.top_k_index for call in calls])
        chosen = index.reshape(-1).clamp(max=experts)
        counts = torch.bincount(chosen, minlength=experts + 1)[:-1].tolist()
        weights = torch.cat([call.weights for call in calls]).reshape(-1)
        return cls(calls, index, weights, torch.argsort(chosen, stable=True), counts)

    @property
    def tokens(self) -> int:
        """The number of tokens of all calls."""
        return len(self.top_k_index)

    @property
    def total(self) -> int:
        """The number of outputs of all experts."""
        return sum(self.counts)

    def used(self) -> list[int]:
        """Return the experts that compute outputs, ascending."""
        return [expert for expert, count in enumerate(self.counts) if count]

    def recent(self) -> set[int]:
        """Return the experts of the last tokens."""
        return {*self.top_k_index[-RECENT:].flatten().tolist()}

    def states(self, tokens: Tensor) -> Tensor:
        """Return the hidden states of ``tokens``, ascending numbers [n] among those of all calls: [n, hidden]."""
        ends = torch.tensor([len(call.x) for call in self.calls], device=CPU).cumsum(0)
        numbers = torch.bincount(torch.bucketize(tokens, ends, right=True), minlength=len(self.calls)).tolist()
        starts = [0, *ends.tolist()]
        chosen = zip(self.calls, torch.split(tokens, numbers), starts, strict=False)
        return torch.cat([call.x.index_select(0, own - start) for call, own, start in chosen if len(own)])


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
    """Let the experts after a group be read while it is computed. ``used``: all experts, ascending.

    The request names all records that are still to be used, so that no prefetch evicts one of them.
    """
    left = [ExpertKey(tiered.block, expert) for expert in used[bisect_left(used, group[0].expert) :]]
    absent = tiered.source.absent(left)
    if absent:
        ahead = [key for key in absent if key.expert <= group[-1].expert + READ_AHEAD]
        tiered.source.prefetch(tiered.block, [*ahead, *set(left).difference(absent)])


def _add_group(
    kernels: ExpertKernels,
    demand: BlockDemand,
    outputs: Outputs,
    group: Sequence[Span],
    sums: Tensor,
    buffer: Tensor,
) -> None:
    """Compute a group of experts, and write their weighted outputs to ``sums``, or add them if there are other groups.

    Args:
        kernels: compiled code.
        demand: the block's demand.
        outputs: the outputs of all groups.
        group: the outputs of each expert of this group.
        sums: [tokens, hidden], of all tokens.
        buffer: has room for the group's outputs.
    """
    begin, end = group[0].begin, group[-1].end
    of_total = len(outputs.used()) if end - begin < outputs.total else 0
    places, computed = outputs.places[begin:end], buffer[: end - begin]
    token_of = places.div(outputs.top_k_index.shape[1], rounding_mode="floor")
    tokens, rows = torch.unique(token_of, return_inverse=True)
    spans = {expert: Span(expert, first - begin, last - begin) for expert, first, last in group}
    _compute(kernels, demand, _part(kernels, outputs.states(tokens), spans, rows, computed), of_total)
    bounds = torch.zeros(outputs.tokens + 1, dtype=torch.int64, device=CPU)
    torch.cumsum(torch.bincount(token_of, minlength=outputs.tokens), 0, out=bounds[1:])
    order = torch.argsort(rows, stable=True)  # by token, and then by expert
    kernels.add_up(computed, outputs.weights[places], order, bounds, sums, is_part=of_total > 0)


def _part(kernels: ExpertKernels, x: Tensor, spans: Mapping[int, Span], rows: Tensor, outputs: Tensor) -> DemandPart:
    """Return the part of a demand that is a group of experts.

    Args:
        kernels: compiled code.
        x: [tokens, hidden].
        spans: by expert, its outputs.
        rows: [R], the row of x for each output.
        outputs: [R, hidden].
    """

    def compute(leases: Sequence[Lease[Tensor]]) -> None:
        for batch in _batches(leases, spans):
            jobs, first = array("q"), 0
            for lease, begin, end in batch:
                jobs.extend((lease.record.data_ptr(), first, end - begin))
                first += end - begin
            gathered = torch.cat([rows[begin:end] for _, begin, end in batch])
            places = array("q", (place for _, begin, end in batch for place in range(begin, end)))
            kernels.compute(x.index_select(0, gathered), jobs, places, outputs)

    def tokens_of() -> TokensOfExperts:
        return {expert: (rows[begin:end].tolist(), range(begin, end)) for expert, begin, end in spans.values()}

    return DemandPart(x, spans, tokens_of, compute, outputs)


def _compute(kernels: ExpertKernels, demand: BlockDemand, part: DemandPart, of_total: int = 0) -> None:
    """Compute a part of a demand, some experts on other hosts. ``of_total`` is that of ``ExpertSource.acquire``."""
    experts, left, tiered = part.experts, part.experts, demand.tiered
    if tiered.remote_compute is not None:
        x, tokens_of = part.x, part.tokens_of()
        with closing(tiered.remote_compute.send(kernels, tiered.block, x.data_ptr(), len(x), tokens_of)) as sent:
            if sent.experts and not of_total:
                demand.announce(experts)
            _compute_leased(
                demand, [expert for expert in experts if expert not in sent.experts], part.compute, of_total
            )
            left = sent.collect(part.outputs.data_ptr())
    _compute_leased(demand, left, part.compute, of_total)


def _compute_leased(
    demand: BlockDemand, experts: Collection[int], compute: Callable[[Sequence[Lease[Tensor]]], None], of_total: int
) -> None:
    """Call ``compute`` with the leases of experts that are available together, until all were computed."""
    if not experts:
        return
    with closing(demand.leases(experts, of_total)) as arriving:
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
