"""The quick way to compute a block: experts that arrive together are multiplied together, where they lie.

Each row of a product depends only on that row and its expert (``kernels/gemm.py``), so it does not matter which experts
arrive together. The shapes of what torch computes between the products depend on the routing alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from moetier.runtime.kernels.gemm import PackedKernels
from moetier.tiers.quant.codec import sections
from moetier.tiers.source import Lease

from .block import TieredBlock, arithmetic, groups, rows_of_experts

ROWS = 256  # at most, that go through experts together: it bounds the memory of intermediate values


def grouped_forward(
    self: Any, here: TieredBlock, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute as ``experts_forward`` says, [tokens, hidden] -> [tokens, hidden]."""
    forward = _one_token if len(hidden_states) == 1 else _tokens
    return forward(self, here, hidden_states, top_k_index, top_k_weights)


def _one_token(module: Any, here: TieredBlock, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute a single token, x [1, hidden].

    Whenever some experts arrive, torch computes all k of them, each at its place in the top-k. So the shapes stay the
    same, and with them the bits.
    """
    compute, accumulate = arithmetic(module, x, top_k_weights)
    experts = top_k_index[0].tolist()
    places = {expert: place for place, expert in enumerate(experts) if expert < module.num_experts}
    if len(set(experts)) < len(experts):  # some routers look their experts up in a table
        return _tokens(module, here, x, top_k_index, top_k_weights)
    row, everywhere = x.to(compute), list(range(len(experts)))
    inner = outer = None

    with closing(groups(here, places)) as arriving:
        for leases in arriving:
            at, ones = [places[lease.key.expert] for lease in leases], [1] * len(leases)
            records = [lease.record for lease in leases]
            inner = _put(inner, at, _project(here, row, records, ones, module, _first(module)), everywhere)
            part = _activate(module, inner)
            part = _project(here, part if at == everywhere else part[at], records, ones, module, "down_proj")
            at = [place if lease.holds() else -1 for place, lease in zip(at, leases, strict=True)]
            outer = _put(outer, at, part, everywhere)
    if outer is None:
        return torch.zeros_like(x)
    if module.has_post_expert_norm:
        outer = module.post_expert_norm(outer)
    weighted = (outer * top_k_weights.T).to(torch.promote_types(accumulate, torch.float32))
    return weighted.sum(0, keepdim=True).to(x.dtype)


def _put(into: Tensor | None, at: list[int], rows: Tensor, everywhere: list[int]) -> Tensor:
    """Put ``rows`` at the places ``at`` of ``into`` [k, N], which is zeros at first; skip rows whose place is -1."""
    if at == everywhere:
        return rows
    if into is None:
        into = rows.new_zeros(len(everywhere), rows.shape[1])
    for place, row in zip(at, rows, strict=True):
        if place >= 0:
            into[place] = row
    return into


def _tokens(module: Any, here: TieredBlock, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute several tokens, x [tokens, hidden]. Each expert is read once, and applied to all its tokens."""
    compute, accumulate = arithmetic(module, x, top_k_weights)
    tokens, k = top_k_index.shape
    rows = rows_of_experts(top_k_index, module.num_experts)
    outer = torch.zeros(tokens * k, x.shape[1], dtype=compute)
    with closing(groups(here, rows)) as arriving:
        for leases in arriving:
            for batch in _batches(leases, rows):
                records, counts = [lease.record for lease, _, _ in batch], [len(token) for _, token, _ in batch]
                gathered = torch.cat([token for _, token, _ in batch])
                inner = _project(here, x.index_select(0, gathered).to(compute), records, counts, module, _first(module))
                inner = torch.cat([_activate(module, part) for part in torch.split(inner, counts)])
                part = _project(here, inner, records, counts, module, "down_proj")
                if module.has_post_expert_norm:
                    part = torch.cat([module.post_expert_norm(piece) for piece in torch.split(part, counts)])
                outer[torch.cat([token * k + position for _, token, position in batch])] = part
            for lease in leases:
                lease.holds()  # if it does not, the expert comes again, and is computed again
    by_token = outer.view(tokens, k, x.shape[1])
    out = torch.zeros_like(x, dtype=torch.promote_types(accumulate, torch.float32))
    for place in range(k):
        out += (by_token[:, place] * top_k_weights[:, place, None]).to(accumulate)
    return out.to(x.dtype)


Batch = list[tuple[Lease[Tensor], Tensor, Tensor]]  # leases, and which tokens and positions in their top-k are theirs


def _batches(leases: Sequence[Lease[Tensor]], rows: dict[int, tuple[Tensor, Tensor]]) -> Iterator[Batch]:
    """Divide leases into batches of at most ROWS rows. An expert's rows are cut after each ROWS of its own."""
    batch: Batch = []
    left = ROWS
    for lease in leases:
        for tokens, positions in zip(*(torch.split(index, ROWS) for index in rows[lease.key.expert]), strict=True):
            if batch and len(tokens) > left:
                yield batch
                batch, left = [], ROWS
            batch.append((lease, tokens, positions))
            left -= len(tokens)
    yield batch


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _project(
    here: TieredBlock, x: Tensor, records: Sequence[Tensor], counts: Sequence[int], module: Any, name: str
) -> Tensor:
    """Multiply x [R, K], ``counts`` rows for each of ``records``, and add the biases -> [R, N]."""
    assert isinstance(here.kernels, PackedKernels)
    y = here.kernels.multiply(x, records, counts, here.layout, name)
    if module.has_bias:
        for part, record in zip(torch.split(y, list(counts)), records, strict=True):
            part += sections(record, here.layout)[f"{name}_bias"]
    return y


def _activate(module: Any, inner: Tensor) -> Tensor:
    """Apply the architecture's activation; its _apply_gate may interleave gate and up, or clamp."""
    out: Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return out
