"""Forward pass of all Experts modules, with experts that are leased from a device tier.

transformers decorates each architecture's Experts class with ``use_experts_implementation``. It gives the class the
flags has_gate, has_bias, is_transposed and has_post_expert_norm, and the method _apply_gate. moetier removes the
parameters of these modules. There are two ways to compute a block. The *exact* way computes one expert after the other,
with the same bits as the architecture's own eager forward pass. The *quick* way multiplies experts that arrive together
in one call, directly from their records.

The result of the quick way does not depend on which experts arrive together. Each row of a product depends only on that
row and its expert (``kernels/gemm.py``), and the shapes of torch's operations between the products depend only on the
routing.
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
ROWS = 256  # largest number of rows computed together in the quick way, which limits memory for intermediate values

_open = threading.local()  # ``source``: the source of this thread's leases that have not ended regularly


@dataclass(frozen=True, slots=True)
class TieredBlock:
    """State of an experts module whose parameters were removed, stored as the module's attribute ``tiered``."""

    block: int  # number of the block
    layout: RecordLayout
    source: ExpertSource[Tensor]
    kernels: Kernels
    device: torch.device  # device of the records
    # called once for each demand with the block, the experts, and whether some of them have not arrived yet
    demanded: Callable[[int, Collection[int], bool], None] | None = None


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Return all Experts modules that use transformers' experts interface, by path, in module order."""
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(type(module), "_apply_gate") and hasattr(module, "has_bias") and hasattr(module, "is_transposed")
    }


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the forward pass of the Experts module ``self``.

    Experts are computed in the order in which they arrive. Their outputs are kept until they can be added up in a fixed
    order, so that the result does not depend on that order. These are at most tokens * top_k * hidden numbers. Memory
    budgets leave room for them up to 4096 tokens (``output_bytes``); a longer prefill takes more memory.

    Args:
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, top_k].
        top_k_weights: [tokens, top_k].

    Returns:
        [tokens, hidden]. A backward pass through the result raises ConfigError.

    Raises:
        ConfigError: the hidden states are not on the device of the records.
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
    """Lease a block's experts, and yield lists of leases that are valid at the same time.

    Records are uint8 [record bytes]. ``here.demanded`` is called once. If all experts are available together, it is
    called before they are yielded. Otherwise it is called after the first list has been computed: at that time other
    experts are still being read, so the call delays nothing.
    """
    if (cut := getattr(_open, "source", None)) is not None:
        with suppress(MoetierError):  # the source may be closed, or belong to another process
            cut.reclaim()
    _open.source = here.source
    left = len(experts)
    demanded = here.demanded  # set to None once it was called
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
    """Return by expert, in ascending order, which tokens use it and at which position in their top-k.

    ``top_k_index`` is [tokens, top_k]. Both tensors of an expert are [rows of the expert]. Rows are in the order of the
    eager forward pass, by position and then by token. Indices of ``experts`` or more are ignored; with expert
    parallelism they mean "computed elsewhere". Waits for the device once.
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
    """Return the types in which the architecture's eager forward pass multiplies, and adds up outputs.

    They are listed here because no flag of the module tells them. Only the types of ``hidden_states`` [tokens, hidden]
    and ``top_k_weights`` [tokens, top_k] are used.
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
    """Return how many bytes the experts' outputs take at most in a prefill of ``tokens``, in a model of ``dtype``."""
    width = next(projection.rows for projection in layout.projections if projection.name == "down_proj")
    numbers = torch.empty(0, dtype=dtype)
    _, accumulate = arithmetic(module, numbers, numbers.float())  # some routers compute weights in fp32
    return tokens * top_k * width * accumulate.itemsize


def _first(module: Any) -> str:
    """Return the name of the projection before the activation."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _activate(module: Any, inner: Tensor) -> Tensor:
    """Apply the architecture's activation, with its own handling of gate and up, as ``_apply_gate`` differs."""
    out: Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return out


# -- exactly -----------------------------------------------------------------------------------------------------------


def _eager(module: Any, here: TieredBlock, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute ``experts_forward`` in the exact way. Outputs are added up in ascending order of experts."""
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
                    continue  # the record was replaced during the computation; it will be leased again
                computed[lease.key.expert] = y
                while waiting and waiting[0] in computed:
                    expert = waiting.popleft()
                    out.index_add_(0, rows[expert][0], computed.pop(expert))
    assert not waiting
    return out.to(hidden_states.dtype)


def _expert(module: Any, here: TieredBlock, record: Tensor, x: Tensor) -> Tensor:
    """Compute one expert: x [rows, hidden] -> [rows, hidden]."""

    def project(x: Tensor, name: str) -> Tensor:
        y = here.kernels.project(x, record, here.layout, name)
        return y + sections(record, here.layout)[f"{name}_bias"].to(y.dtype) if module.has_bias else y

    x = project(_activate(module, project(x, _first(module))), "down_proj")
    return module.post_expert_norm(x) if module.has_post_expert_norm else x


# -- quickly -----------------------------------------------------------------------------------------------------------


def _one_token(module: Any, here: TieredBlock, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute a single token, x [1, hidden], in the quick way.

    Whenever some experts arrive, the activation is computed for all k places of the top-k. So the shapes of torch's
    operations never differ, and neither do the bits of the result.
    """
    experts = top_k_index[0].tolist()
    places = {expert: place for place, expert in enumerate(experts) if expert < module.num_experts}
    if len(set(experts)) < len(experts):  # some routers take experts from a table, which may name one twice
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
    """Put ``rows`` at the places ``at`` of ``into`` [k, N], or of new zeros if it is None. Skip rows with place -1."""
    if into is None:
        into = rows.new_zeros(k, rows.shape[1])
    for place, row in zip(at, rows, strict=True):
        if place >= 0:
            into[place] = row
    return into


def _tokens(module: Any, here: TieredBlock, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute several tokens, x [tokens, hidden], in the quick way. An expert is leased once for all its tokens."""
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
                lease.holds()  # if it does not, the expert is leased and computed again
    by_token = outer.view(tokens, k, x.shape[1])
    out = torch.zeros_like(x, dtype=torch.promote_types(accumulate, torch.float32))
    for place in range(k):
        out += (by_token[:, place] * top_k_weights[:, place, None]).to(accumulate)
    return out.to(x.dtype)


Batch = list[tuple[Lease[Tensor], Tensor, Tensor]]  # (lease, tokens that use it, their positions in the top-k)


def _batches(leases: Sequence[Lease[Tensor]], rows: dict[int, tuple[Tensor, Tensor]]) -> Iterator[Batch]:
    """Divide the rows of leased experts into batches of at most ROWS rows. ``rows`` is from ``rows_of_experts``."""
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
    """Multiply x [R, K] -> [R, N] and add biases. ``counts`` are the numbers of consecutive rows of ``records``."""
    assert isinstance(here.kernels, PackedKernels)
    y = here.kernels.multiply(x, records, counts, here.layout, name)
    if module.has_bias:
        for part, record in zip(torch.split(y, list(counts)), records, strict=True):
            part += sections(record, here.layout)[f"{name}_bias"]
    return y


# -- gradients ---------------------------------------------------------------------------------------------------------


def without_gradient(out: Tensor, *inputs: Tensor) -> Tensor:
    """Return ``out``, with a backward pass that raises ConfigError. It was computed from ``inputs`` without gradients.

    Without this, gradients would silently be None. Gradients are not just switched off for the trunk's parameters,
    because then torch multiplies in another order, and the model would no longer have the same bits as the original.
    All tensors may have any shape, such as [tokens, hidden].
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
