"""Forward pass of every Experts module, with experts that are leased from a device tier.

transformers decorates each architecture's Experts class with ``use_experts_implementation``, which gives it the flags
has_gate, has_bias, is_transposed and has_post_expert_norm, and the method _apply_gate. moetier takes the parameters of
such a module away. There are two ways to compute a block: exactly, expert by expert, bit for bit as the architecture's
own eager forward does, and quickly, where experts that arrive together are multiplied together, where they lie.

The quick way does not depend on which experts arrive together: each row of a product depends only on that row and its
expert (``kernels/gemm.py``), and the shapes of what torch computes between the products depend on the routing alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from moetier.runtime.kernels.api import Kernels, moved_error
from moetier.runtime.kernels.gemm import PackedKernels
from moetier.tiers.errors import ConfigError, MoetierError
from moetier.tiers.layout import ExpertKey, RecordLayout
from moetier.tiers.quant.codec import sections
from moetier.tiers.source import ExpertSource, Lease

EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
ROWS = 256  # at most, that go through experts together in the quick way: it bounds the memory of intermediate values

_open = threading.local()  # ``source``: of this thread's leases that have not ended in order


@dataclass(frozen=True, slots=True)
class TieredBlock:
    """Attribute ``tiered`` of an Experts module, in place of its parameters."""

    block: int
    layout: RecordLayout
    source: ExpertSource[Tensor]
    kernels: Kernels
    device: torch.device  # of the records
    # called once for each demand with the block, its experts, and whether some of them are still to come
    demanded: Callable[[int, Collection[int], bool], None] | None = None


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Path -> module of all Experts modules that transformers' experts interface dispatches, in module order."""
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(type(module), "_apply_gate") and hasattr(module, "has_bias") and hasattr(module, "is_transposed")
    }


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the forward pass of the Experts module ``self``.

    Experts are computed in the order in which they arrive. Their outputs are kept until all can be added up in a fixed
    order, so that the result depends on no tier. They are tokens * top_k * hidden numbers at most, for which budgets
    leave room up to 4096 tokens (``output_bytes``); a longer prefill takes more.

    Args:
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, top_k].
        top_k_weights: [tokens, top_k].

    Returns:
        [tokens, hidden]. If a gradient through it is asked for, the backward pass raises ConfigError.
    """
    here: TieredBlock = self.tiered
    if hidden_states.device != here.device:
        raise moved_error(hidden_states.device, here.device)
    forward: Callable[..., Tensor] = _eager
    if here.kernels.packs(here.layout):
        forward = _one_token if len(hidden_states) == 1 else _tokens
    with torch.no_grad():
        out = here.kernels.with_room(partial(forward, self, here, hidden_states, top_k_index, top_k_weights))
    return without_gradient(out, hidden_states, top_k_weights)


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
    demanded = here.demanded  # None once it was called
    with closing(here.source.acquire([ExpertKey(here.block, expert) for expert in experts])) as leases:
        group = []
        for lease in leases:
            group.append(lease)
            left -= 1
            if lease.more:
                continue
            if demanded is not None and left <= 0:
                demanded(here.block, experts, False)
                demanded = None
            yield group
            group = []
            if demanded is not None:
                demanded(here.block, experts, True)
                demanded = None
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


def output_bytes(module: Any, layout: RecordLayout, tokens: int, top_k: int, dtype: torch.dtype) -> int:
    """The most bytes that experts' outputs take in a prefill of ``tokens`` of a model of ``dtype``."""
    width = next(projection.rows for projection in layout.projections if projection.name == "down_proj")
    numbers = torch.empty(0, dtype=dtype)
    _, accumulate = arithmetic(module, numbers, numbers.float())  # some routers weigh in fp32
    return tokens * top_k * width * accumulate.itemsize


def _first(module: Any) -> str:
    """The name of the projection before the activation."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _activate(module: Any, inner: Tensor) -> Tensor:
    """Apply the architecture's activation; its _apply_gate may interleave gate and up, or clamp."""
    out: Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return out


# -- exactly -----------------------------------------------------------------------------------------------------------


def _eager(module: Any, here: TieredBlock, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute as ``experts_forward`` says; outputs are added up in ascending order of their experts."""
    compute, accumulate = arithmetic(module, hidden_states, top_k_weights)
    rows = rows_of_experts(top_k_index, module.num_experts)
    waiting, computed = deque(rows), dict[int, Tensor]()
    out = torch.zeros_like(hidden_states, dtype=accumulate)

    with closing(groups(here, rows)) as arriving:
        for leases in arriving:
            for lease in leases:
                tokens, positions = rows[lease.key.expert]
                y = _expert(module, here, lease.record, hidden_states[tokens].to(compute))
                y = (y * top_k_weights[tokens, positions, None]).to(accumulate)
                if not lease.holds():
                    continue  # its record was replaced while this was computed on it: it comes again
                computed[lease.key.expert] = y
                while waiting and waiting[0] in computed:
                    expert = waiting.popleft()
                    out.index_add_(0, rows[expert][0], computed.pop(expert))
    assert not waiting
    return out.to(hidden_states.dtype)


def _expert(module: Any, here: TieredBlock, record: Tensor, x: Tensor) -> Tensor:
    """x [rows, hidden] -> [rows, hidden] through one expert."""

    def project(x: Tensor, name: str) -> Tensor:
        y = here.kernels.project(x, record, here.layout, name)
        return y + sections(record, here.layout)[f"{name}_bias"].to(y.dtype) if module.has_bias else y

    x = project(_activate(module, project(x, _first(module))), "down_proj")
    return module.post_expert_norm(x) if module.has_post_expert_norm else x


# -- quickly -----------------------------------------------------------------------------------------------------------


def _one_token(module: Any, here: TieredBlock, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute a single token, x [1, hidden].

    Whenever some experts arrive, torch computes all k of them, each at its place in the top-k. So the shapes stay the
    same, and with them the bits.
    """
    experts = top_k_index[0].tolist()
    places = {expert: place for place, expert in enumerate(experts) if expert < module.num_experts}
    if len(set(experts)) < len(experts):  # some routers look their experts up in a table
        return _tokens(module, here, x, top_k_index, top_k_weights)
    compute, accumulate = arithmetic(module, x, top_k_weights)
    row, everywhere = x.to(compute), list(range(len(experts)))
    inner = outer = None

    with closing(groups(here, places)) as arriving:
        for leases in arriving:
            at, ones = [places[lease.key.expert] for lease in leases], [1] * len(leases)
            records = [lease.record for lease in leases]
            part = _project(here, row, records, ones, module, _first(module))
            inner = part if at == everywhere else _put(inner, at, part, len(everywhere))
            part = _activate(module, inner)
            part = _project(here, part if at == everywhere else part[at], records, ones, module, "down_proj")
            at = [place if lease.holds() else -1 for place, lease in zip(at, leases, strict=True)]
            outer = part if at == everywhere else _put(outer, at, part, len(everywhere))
    if outer is None:
        return torch.zeros_like(x)
    if module.has_post_expert_norm:
        outer = module.post_expert_norm(outer)
    weighted = (outer * top_k_weights.T).to(torch.promote_types(accumulate, torch.float32))
    return weighted.sum(0, keepdim=True).to(x.dtype)


def _put(into: Tensor | None, at: list[int], rows: Tensor, k: int) -> Tensor:
    """Put ``rows`` at the places ``at`` of ``into`` [k, N], which is zeros at first; skip rows whose place is -1."""
    if into is None:
        into = rows.new_zeros(k, rows.shape[1])
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


# -- gradients ---------------------------------------------------------------------------------------------------------


def without_gradient(out: Tensor, *inputs: Tensor) -> Tensor:
    """Return ``out``, which was computed from ``inputs`` without a gradient; its backward pass raises ConfigError.

    All may have any shape, such as [tokens, hidden].

    Otherwise the gradient would silently be None. The trunk's parameters go on requiring gradients: torch multiplies in
    another order where they don't, and the model would no longer be bit for bit the ordinary one.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return cast("Tensor", _NoGradient.apply(out, *inputs))  # type: ignore[no-untyped-call, unused-ignore]
    return out


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Any:
        raise ConfigError(
            "A gradient is wanted through the experts, or through a quantised matrix of the trunk, which moetier does "
            "not compute: its models are for inference.",
            "Train the ordinary model, and convert what comes out.",
        )
