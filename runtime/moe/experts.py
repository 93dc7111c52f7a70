"""Forward pass of all Experts modules, with experts of a device tier: leased, or found in their slots by compiled code.

transformers decorates each architecture's Experts class with ``use_experts_implementation``. It gives the class the
flags has_gate, has_bias, is_transposed and has_post_expert_norm, and the method _apply_gate. moetier removes the
parameters of these modules. There are two ways to compute a block. The *exact* way computes one expert after the other,
with the same bits as the architecture's own eager forward pass. The *quick* way computes experts that are available
together in one call of compiled code, directly from their records (``quick.py``; in slots of a device, ``slots.py``). A
module whose activation compiled code does not have (``activation.py``), or which norms its outputs, is computed one
expert after the other too, but with products from records (``kernels/products/packed.py``).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from contextvars import Context, ContextVar, copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moetier.runtime.kernels.products.api import has_memory, moved_error
from moetier.runtime.libraries.transformers_internals import apply_gate, is_experts_class
from moetier.tiers.layout import RecordLayout
from moetier.tiers.quant.codec import sections

from .block import BlockDemand, RoutedTokens, TieredBlock, group_by_expert, release_open_leases
from .gradients import without_gradient
from .quick import compute_quick, kernels_of
from .slots import compute_in_slots, slot_kernels_of

_pause: ContextVar[Callable[[Any, RoutedTokens], Tensor] | None] = ContextVar("moetier_pause", default=None)

EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Return all Experts modules that use transformers' experts interface, by path, in module order."""
    return {
        path: module
        for path, module in model.named_modules()
        if is_experts_class(type(module)) and hasattr(module, "has_bias") and hasattr(module, "is_transposed")
    }


@contextlib.contextmanager
def without_experts(model: nn.Module) -> Iterator[None]:
    """Let all Experts modules return their hidden states within the block, for trials of what is not experts."""
    modules = experts_modules(model).values()
    for module in modules:
        module.__dict__["forward"] = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the forward pass of the Experts module ``self``.

    Experts are computed in the order in which they arrive. Their outputs are kept until they can be added up in a fixed
    order, so that the result does not depend on the order of arrival. The outputs are at most tokens * top_k * hidden
    numbers. Memory budgets leave room for them (``output_bytes``).

    Args:
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, top_k].
        top_k_weights: [tokens, top_k].

    Returns:
        [tokens, hidden]. A backward pass through the result raises ConfigError.

    Raises:
        ConfigError: the hidden states are not on the device of the records.
        ValueError: the shapes do not fit each other, or do not fit the records.
    """
    tiered: TieredBlock = self.tiered
    if hidden_states.device != tiered.device:
        raise moved_error(hidden_states.device, tiered.device)
    routed = RoutedTokens(hidden_states, top_k_index, top_k_weights)
    if (pause := _pause.get()) is not None:
        return pause(self, routed)
    if not torch.is_grad_enabled():
        return next(compute_together(self, [routed]))
    with torch.no_grad():
        out = next(compute_together(self, [routed]))
    return without_gradient(out, hidden_states, top_k_weights)


def compute_together(
    module: Any, calls: Sequence[RoutedTokens], between: Callable[[], object] = lambda: None
) -> Generator[Tensor, None, None]:
    """Compute an Experts module without gradients for several calls together, and yield their results [tokens, hidden].

    Each expert is leased once for all of them. ``between`` is called between groups of experts, while no expert is
    leased.
    """
    release_open_leases()
    tiered: TieredBlock = module.tiered
    kernels = kernels_of(module, tiered, calls[0].x.dtype)
    if kernels is not None and all(has_memory(call.x) and has_memory(call.weights) for call in calls):
        yield from compute_quick(kernels, tiered, calls, between)
        return
    together = RoutedTokens(
        *(torch.cat(tensors) if len(calls) > 1 else tensors[0] for tensors in zip(*calls, strict=True))
    )
    if (in_slots := slot_kernels_of(module, tiered)) is not None:
        work = partial(compute_in_slots, in_slots, tiered, module.num_experts, together)
    else:
        work = partial(_eager, module, tiered, *together)
    out = tiered.kernels.with_room(work)
    yield from torch.split(out, [len(call.x) for call in calls])


def pausing(pause: Callable[[Any, RoutedTokens], Tensor]) -> Context:
    """Return a context in which Experts modules return what ``pause`` does: [tokens, hidden] for a module's inputs."""
    context = copy_context()
    context.run(_pause.set, pause)
    return context


def arithmetic(module: Any, hidden_states: Tensor, top_k_weights: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the types in which the architecture's eager forward pass multiplies, and in which it adds up outputs.

    Exceptions are listed here because no flag of the module tells them. Only the types of ``hidden_states``
    [tokens, hidden] and ``top_k_weights`` [tokens, top_k] are used.
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
    """Return the most bytes that experts' outputs take in a prefill of ``tokens`` tokens, in a model of ``dtype``."""
    width = next(projection.rows for projection in layout.projections if projection.name == "down_proj")
    numbers = torch.empty(0, dtype=dtype)
    _, accumulate = arithmetic(module, numbers, numbers.float())  # some routers compute weights in fp32
    kept = torch.float32 if dtype == torch.float16 else accumulate  # compiled code has no float16
    return tokens * top_k * width * kept.itemsize


def _eager(
    module: Any, tiered: TieredBlock, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute ``experts_forward`` one expert after the other, and add up outputs in ascending order of experts.

    If ``tiered.kernels`` are exact, this is the exact way that the module's docstring describes.
    """
    compute, accumulate = arithmetic(module, hidden_states, top_k_weights)
    tokens_of = group_by_expert(top_k_index, module.num_experts)
    waiting, computed = deque(tokens_of), dict[int, Tensor]()
    out = torch.zeros_like(hidden_states, dtype=accumulate)

    with closing(BlockDemand(tiered).leases(tokens_of)) as arriving:
        for leases in arriving:
            for lease in leases:
                tokens, positions = tokens_of[lease.key.expert]
                y = _expert(module, tiered, lease.record, hidden_states[tokens].to(compute))
                y = (y * top_k_weights[tokens, positions, None]).to(accumulate)
                if not lease.validate():
                    continue  # the record was replaced during the computation; it will be leased again
                computed[lease.key.expert] = y
                while waiting and waiting[0] in computed:
                    expert = waiting.popleft()
                    out.index_add_(0, tokens_of[expert][0], computed.pop(expert))
    assert not waiting
    return out.to(hidden_states.dtype)


def _expert(module: Any, tiered: TieredBlock, record: Tensor, x: Tensor) -> Tensor:
    """Compute one expert: x [tokens, hidden] -> [tokens, hidden]."""

    def project(x: Tensor, name: str) -> Tensor:
        y = tiered.kernels.project(x, record, tiered.layout, name)
        return y + sections(record, tiered.layout)[f"{name}_bias"].to(y.dtype) if module.has_bias else y

    y = project(x, "gate_up_proj" if module.has_gate else "up_proj")
    y = project(apply_gate(module, y) if module.has_gate else module.act_fn(y), "down_proj")
    return module.post_expert_norm(y) if module.has_post_expert_norm else y
